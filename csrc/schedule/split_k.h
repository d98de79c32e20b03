// Split-K: distributes the k-iterations of all output tiles of one launch over CTAs.
#pragma once

#include <cstdint>
#include <vector>

#include "schedule/work_list.h"

namespace deeplab_fast::schedule {

// The work of one pixel tile: num_blocks output tiles of num_k_iters k-iterations each.
struct TileWork {
  int32_t num_k_iters, num_blocks;
};

struct WorkList {
  std::vector<WorkItem> work_items;   // longest first
  std::vector<int32_t> ctas;          // [work_items]: the CTA of each work item
  std::vector<Reduction> reductions;  // one per split output tile
  int32_t num_slots = 0;              // workspace slots
};

// Work items for `num_ctas` CTAs. Output tiles are split if the CTAs would otherwise finish
// unevenly. Three ways are tried: no splitting; equal pieces of 1/4 to 2 shares; and CTAs that are
// filled, one after another, to 1 to 1.5 shares. A share is the cost of all unsplit tiles /
// num_ctas. The way that finishes first is used, but a split has to finish at least 1 % earlier.
// Costs are in k-iterations: split_cost to write the sums of a piece and read them back, item_cost
// to begin a work item and store its sums.
WorkList split_k(const std::vector<TileWork>& tiles, int32_t num_ctas, int32_t split_cost,
                 int32_t item_cost);

}  // namespace deeplab_fast::schedule
