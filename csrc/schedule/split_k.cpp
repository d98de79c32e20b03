#include "schedule/split_k.h"

#include <algorithm>
#include <functional>
#include <queue>
#include <stdexcept>
#include <string>
#include <utility>

namespace deeplab_fast::schedule {
namespace {

using Cuts = std::vector<int32_t>;  // the k-iterations at which the pieces of an output tile end

// Cuts into pieces of at most `limit` k-iterations, whose lengths differ by at most one.
struct EqualPieces {
  int64_t limit;

  Cuts operator()(int64_t num_k_iters) {
    const int64_t pieces = std::max<int64_t>(1, (num_k_iters + limit - 1) / limit);
    Cuts ends;
    for (int64_t p = 1; p <= pieces; ++p)
      ends.push_back(static_cast<int32_t>(num_k_iters * p / pieces));
    return ends;
  }
};

// Cost of a work item besides its k-iterations, in k-iterations: `item` for each, and `split` more
// for a piece of a split tile.
struct Costs {
  int32_t item, split;
};

// The wrap-around rule: CTAs are filled to `limit` one after another, and an output tile that does
// not fit is continued by the next CTA (McNaughton, "Scheduling with Deadlines and Loss Functions",
// 1959). Unlike in that paper, each piece has a fixed cost, and no piece is shorter than the cost
// of a split.
struct WrapAround {
  int64_t limit;
  Costs costs;
  int64_t used = 0;  // cost of the work that the current CTA has so far

  Cuts operator()(int64_t num_k_iters) {
    const int64_t shortest = std::max<int64_t>(1, costs.split);
    Cuts ends;
    for (int64_t begin = 0;;) {
      const int64_t rest = num_k_iters - begin;
      const int64_t cost = rest + costs.item + (begin > 0 ? costs.split : 0);
      const int64_t piece = limit - used - costs.item - costs.split;
      const bool can_cut = std::min(piece, rest - piece) >= shortest;
      if (used + cost <= limit || (used == 0 && !can_cut)) {
        used += cost;
        ends.push_back(static_cast<int32_t>(num_k_iters));
        return ends;
      }
      if (can_cut) {
        begin += piece;
        ends.push_back(static_cast<int32_t>(begin));
      }
      used = 0;
    }
  }
};

// Work items of all output tiles; cut(num_k_iters) returns the cuts of a tile.
template <typename Cut>
WorkList cut_tiles(const std::vector<TileWork>& tiles, Cut cut) {
  WorkList list;
  for (size_t t = 0; t < tiles.size(); ++t) {
    for (int32_t block = 0; block < tiles[t].num_blocks; ++block) {
      const int32_t tile = static_cast<int32_t>(t);
      const Cuts ends = cut(tiles[t].num_k_iters);
      if (ends.size() == 1) {
        list.work_items.push_back({tile, block, 0, tiles[t].num_k_iters, -1});
        continue;
      }
      const int32_t first_slot = list.num_slots;
      int32_t begin = 0;
      for (int32_t end : ends) {
        list.work_items.push_back({tile, block, begin, end - begin, list.num_slots++});
        begin = end;
      }
      list.reductions.push_back({tile, block, first_slot, static_cast<int32_t>(ends.size())});
    }
  }
  return list;
}

// Sorts the items, longest first, and assigns each to the CTA that is free first (Graham, "Bounds
// on Multiprocessing Timing Anomalies", 1969). Returns the makespan: the time at which the last CTA
// is done.
int64_t assign_ctas(WorkList& list, int32_t num_ctas, const Costs& costs) {
  std::stable_sort(
      list.work_items.begin(), list.work_items.end(),
      [](const WorkItem& a, const WorkItem& b) { return a.num_k_iters > b.num_k_iters; });
  using Load = std::pair<int64_t, int32_t>;  // time at which a CTA is free, and its index
  std::priority_queue<Load, std::vector<Load>, std::greater<Load>> loads;
  for (int32_t cta = 0; cta < num_ctas; ++cta) loads.push({0, cta});
  int64_t makespan = 0;
  for (const WorkItem& item : list.work_items) {
    const auto [begin, cta] = loads.top();
    const int64_t end = begin + item.num_k_iters + costs.item + (item.slot < 0 ? 0 : costs.split);
    loads.pop();
    loads.push({end, cta});
    list.ctas.push_back(cta);
    makespan = std::max(makespan, end);
  }
  return makespan;
}

}  // namespace

WorkList split_k(const std::vector<TileWork>& tiles, int32_t num_ctas, int32_t split_cost,
                 int32_t item_cost) {
  if (num_ctas < 1 || split_cost < 0 || item_cost < 0)
    throw std::invalid_argument(
        "split_k: expected num_ctas of at least 1, split_cost and item_cost not negative, got " +
        std::to_string(num_ctas) + ", " + std::to_string(split_cost) + " and " +
        std::to_string(item_cost));
  const Costs costs = {item_cost, split_cost};
  int64_t total = 0, longest = 1;
  for (const TileWork& tile : tiles) {
    if (tile.num_k_iters < 0 || tile.num_blocks < 0)
      throw std::invalid_argument(
          "split_k: expected k-iterations and channel blocks of a tile not negative, got " +
          std::to_string(tile.num_k_iters) + " and " + std::to_string(tile.num_blocks));
    total += (int64_t{tile.num_k_iters} + item_cost) * tile.num_blocks;
    if (tile.num_blocks > 0) longest = std::max<int64_t>(longest, tile.num_k_iters);
  }
  const auto share = [&](int64_t sixty_fourths) {
    return std::max<int64_t>(1, total * sixty_fourths / (64 * int64_t{num_ctas}));
  };
  WorkList whole = cut_tiles(tiles, EqualPieces{longest});
  const int64_t whole_makespan = assign_ctas(whole, num_ctas, costs);
  WorkList best = whole;
  int64_t best_makespan = whole_makespan;
  const auto keep_if_better = [&](WorkList trial) {
    const int64_t makespan = assign_ctas(trial, num_ctas, costs);
    if (makespan < best_makespan) {
      best = std::move(trial);
      best_makespan = makespan;
    }
  };
  for (int64_t part = 128; part >= 16; part -= 4)
    if (share(part) < longest) keep_if_better(cut_tiles(tiles, EqualPieces{share(part)}));
  for (int64_t part = 64; part <= 96; ++part)
    keep_if_better(cut_tiles(tiles, WrapAround{share(part), costs}));
  return best_makespan + best_makespan / 100 < whole_makespan ? best : whole;
}

}  // namespace deeplab_fast::schedule
