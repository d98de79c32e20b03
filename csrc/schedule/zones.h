// What a dilated convolution has to multiply, and in which order: never by whole tiles of padding.
//
// A tap (dy, dx) of an output pixel (y, x) reads input pixel (y + dy, x + dx). Cutting the map at
// -dy (dy < 0) or H - dy (dy > 0) of every tap, and likewise in x, leaves rectangles ("zones") with
// one set of in-image taps each: at most k * k for one k x k kernel. Pixels are listed zone by
// zone, images included, and every BLOCK_M of them make a tile that runs the union of its pixels'
// taps; the few (pixel, tap) pairs of a union that lie outside are zero-filled by the kernel.
// Trimming products with padding: C-K-S, "ConvV2". Longest first: Graham, "Bounds on
// Multiprocessing Timing Anomalies" (1969).
//
// The order of the zones starts as a snake over their grid, neighbours sharing most taps, and is
// improved by local search: executed / dense products of three 3x3 branches, one image,
//                                    plain runs of 128   snake   searched   exact
//   33x33, rates 6, 12, 18                      .823     .701       .662    .584
//   65x65, rates 12, 24, 36                     .771     .612       .605    .578
//
// Every struct below is a row of int32, so that a vector of them is a [rows, fields] tensor.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <iterator>
#include <limits>
#include <map>
#include <numeric>
#include <queue>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "common/host_device.h"

namespace deeplab_fast {

// A stride 1, 'same' convolution; kernel sizes are odd.
struct Branch {
  int32_t kernel_H, kernel_W, dilation_H, dilation_W;
};

// N maps of H x W pixels; pixel (n, y, x) has index (n * H + y) * W + x, below 2^31. Offsets of its
// channels may pass 2^31: multiply the index in int64.
struct Plane {
  int32_t N, H, W;
};

struct alignas(16) Tap {  // a kernel loads it at once
  int32_t dy, dx;         // from output to input pixel; clipped to H and W, outside the map anyway
  int32_t branch;         // whose weight
  int32_t index;          // r * kernel_W + s of the weight [K, C, kernel_H, kernel_W]
};

// Consecutive entries of TileList::pixels; every pixel runs every tap of the tile.
struct Tile {
  int32_t output;  // forward: the branch; input gradient: 0
  int32_t first_pixel, num_pixels;
  int32_t first_tap, num_taps;  // into TileList::taps; num_taps is the cost
};

struct TileList {
  std::vector<int32_t> pixels;  // pixel indices; every output lists each pixel once
  std::vector<Tap> taps;        // tap sets, shared by the tiles of an output that run the same
  std::vector<Tile> tiles;      // in order of pixels
};

// The output pixels at which one tap is inside: those of its weight gradient. None: h = w = 0, and
// the gradient has to be written as zeros.
struct TapRectangle {
  Tap tap;
  int32_t y, x, h, w;
};

// Something to compute as `blocks` independent sums (channel blocks) of `steps` terms each.
struct Job {
  int32_t steps, blocks;
};

// Steps first_step .. first_step + num_steps of one block of a job.
struct WorkItem {
  int32_t job, block;
  int32_t first_step, num_steps;  // 0 steps: write zeros
  int32_t slot;                   // -1: the whole sum, else where the partial sum goes
  int32_t reduction;              // -1, or the Reduction it belongs to
};

// A pixel of a TileList as a kernel needs it that is not to divide: H and W are below 2^15.
struct alignas(8) ListedPixel {
  int32_t index, yx;  // y * 2^16 + x
};

// A WorkItem together with its Tile, so that a kernel neither follows another pointer nor divides:
// the fields of both, and which tap of its tile and which input channel the item begins with.
struct alignas(16) TileItem {
  int32_t block, output, slot, num_steps;
  int32_t first_pixel, num_pixels, first_tap, num_taps;
  int32_t tap, c;
  int32_t first_index, first_image;  // of the tile's first pixel
};

// The same for a WorkItem of a weight gradient, whose steps are boxes of pixels that are copied
// together: its tap, its channels, how many boxes cover the rectangle, and the box it begins with.
struct alignas(16) BoxItem {
  int32_t slot, num_steps, branch, index;  // index: Tap::index
  int32_t k, c;                            // the first output channel of the branch, input channel
  int32_t dy, dx;
  int32_t y, x, rows, columns;  // of the rectangle: its first pixel, boxes
  int32_t row, column, n;       // the first box, n in images
  int32_t unused;
};

// A split sum: slots first_slot .. first_slot + num_slots, added in this order, whoever adds them.
struct Reduction {
  int32_t job, block;
  int32_t first_slot, num_slots;
};

struct Schedule {
  std::vector<WorkItem> items;   // longest first
  std::vector<int32_t> workers;  // that take the items, each the next one when it is free
  std::vector<Reduction> reductions;
  int64_t num_slots = 0;
  int64_t makespan = 0;  // steps until the last of the workers is done, each taking the next item
};

// Whether `tap` of output pixel (y, x) reads inside the map.
HOST_DEVICE bool is_inside(const Tap& tap, int32_t y, int32_t x, int32_t H, int32_t W) {
  return static_cast<uint32_t>(y) + static_cast<uint32_t>(tap.dy) < static_cast<uint32_t>(H) &&
         static_cast<uint32_t>(x) + static_cast<uint32_t>(tap.dx) < static_cast<uint32_t>(W);
}

// All taps of the branches, in order. `mirrored` for the input gradient: input pixel p receives
// what output pixel p + (dy, dx) of the branch has to give.
inline std::vector<Tap> list_taps(const std::vector<Branch>& branches, int32_t H, int32_t W,
                                  bool mirrored) {
  if (H < 0 || W < 0)
    throw std::invalid_argument("H and W must not be negative, got " + std::to_string(H) + " and " +
                                std::to_string(W));
  const auto offset = [&](int32_t i, int32_t kernel, int32_t dilation, int32_t size) {
    const int64_t forward = static_cast<int64_t>(i - kernel / 2) * dilation;
    return static_cast<int32_t>(std::clamp<int64_t>(mirrored ? -forward : forward, -size, size));
  };
  std::vector<Tap> taps;
  for (size_t b = 0; b < branches.size(); ++b) {
    const auto [kernel_H, kernel_W, dilation_H, dilation_W] = branches[b];
    if (kernel_H < 1 || kernel_W < 1 || kernel_H % 2 == 0 || kernel_W % 2 == 0)
      throw std::invalid_argument("kernel sizes must be odd, got " + std::to_string(kernel_H) +
                                  " x " + std::to_string(kernel_W));
    if (dilation_H < 1 || dilation_W < 1)
      throw std::invalid_argument("dilation must be at least 1, got " + std::to_string(dilation_H) +
                                  ", " + std::to_string(dilation_W));
    for (int32_t r = 0; r < kernel_H; ++r)
      for (int32_t s = 0; s < kernel_W; ++s)
        taps.push_back({offset(r, kernel_H, dilation_H, H), offset(s, kernel_W, dilation_W, W),
                        static_cast<int32_t>(b), r * kernel_W + s});
  }
  return taps;
}

// One rectangle per forward tap, the empty ones included.
inline std::vector<TapRectangle> list_tap_rectangles(const std::vector<Branch>& branches, int32_t H,
                                                     int32_t W) {
  std::vector<TapRectangle> rectangles;
  for (const Tap& tap : list_taps(branches, H, W, /*mirrored=*/false)) {
    const int32_t h = H - std::abs(tap.dy), w = W - std::abs(tap.dx);
    if (h > 0 && w > 0) {
      rectangles.push_back({tap, std::max(0, -tap.dy), std::max(0, -tap.dx), h, w});
    } else {
      rectangles.push_back({tap, 0, 0, 0, 0});
    }
  }
  return rectangles;
}

// Where a walk over the pixels of a rectangle is: row by row, then in the next image.
struct RectanglePixel {
  int32_t y, x;   // within the rectangle
  int32_t index;  // on the plane
};

// How such a walk gets `step` pixels further without dividing: by dy rows and dx pixels, which is
// less than a rectangle and less than a row, and by whole images.
struct RectangleStep {
  int32_t h, w, dy, dx, index;
  int32_t row_gap, image_gap;  // pixels of the plane between two rows, two images of the rectangle
};

HOST_DEVICE RectanglePixel rectangle_pixel(const TapRectangle& rectangle, int32_t H, int32_t W,
                                           int32_t i) {
  const auto [tap, first_y, first_x, h, w] = rectangle;
  const int32_t x = i % w, y = i / w % h, n = i / w / h;
  return {y, x, (n * H + first_y + y) * W + first_x + x};
}

HOST_DEVICE RectangleStep rectangle_step(const TapRectangle& rectangle, int32_t H, int32_t W,
                                         int32_t step) {
  const int32_t h = rectangle.h, w = rectangle.w;
  const int32_t dx = step % w, dy = step / w % h, n = step / w / h;
  return {h, w, dy, dx, (n * H + dy) * W + dx, W - w, (H - h) * W};
}

HOST_DEVICE void advance(RectanglePixel& pixel, const RectangleStep& step) {
  pixel.x += step.dx;
  pixel.y += step.dy;
  pixel.index += step.index;
  if (pixel.x >= step.w) {
    pixel.x -= step.w;
    pixel.y += 1;
    pixel.index += step.row_gap;
  }
  if (pixel.y >= step.h) {
    pixel.y -= step.h;
    pixel.index += step.image_gap;
  }
}

namespace zones {

using TapSet = std::vector<uint64_t>;  // a bit per tap

inline int64_t size(const TapSet& set) {
  int64_t bits = 0;
  for (uint64_t word : set) bits += __builtin_popcountll(word);
  return bits;
}

struct Zone {
  int32_t y, x, h, w;
  TapSet taps;
};

// Coordinates at which some offset starts or stops to be inside [0, size), and both ends.
inline std::vector<int32_t> cut_points(std::vector<int32_t> offsets, int32_t size) {
  std::vector<int32_t> cuts = {0, size};
  for (int32_t d : offsets)
    if (d != 0 && std::abs(d) < size) cuts.push_back(d < 0 ? -d : size - d);
  std::sort(cuts.begin(), cuts.end());
  cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
  return cuts;
}

// Row by row, every second row backwards.
inline std::vector<Zone> snake(const std::vector<Tap>& taps, int32_t H, int32_t W) {
  std::vector<int32_t> dys, dxs;
  for (const Tap& tap : taps) {
    dys.push_back(tap.dy);
    dxs.push_back(tap.dx);
  }
  const std::vector<int32_t> ys = cut_points(dys, H), xs = cut_points(dxs, W);
  if (static_cast<double>(ys.size()) * xs.size() * taps.size() > 0x1p28)
    throw std::invalid_argument("too many taps for a work list: " + std::to_string(taps.size()));
  std::vector<Zone> result;
  for (size_t i = 0; i + 1 < ys.size(); ++i) {
    std::vector<Zone> row;
    for (size_t j = 0; j + 1 < xs.size(); ++j) {
      Zone zone = {ys[i], xs[j], ys[i + 1] - ys[i], xs[j + 1] - xs[j],
                   TapSet((taps.size() + 63) / 64)};
      for (size_t t = 0; t < taps.size(); ++t)
        if (is_inside(taps[t], zone.y, zone.x, H, W)) zone.taps[t / 64] |= uint64_t{1} << t % 64;
      row.push_back(std::move(zone));
    }
    if (i % 2 == 1) std::reverse(row.begin(), row.end());
    std::move(row.begin(), row.end(), std::back_inserter(result));
  }
  return result;
}

using Order = std::vector<int32_t>;  // of the zones

// Calls emit(taps, num_pixels, num_tiles) for runs of equal tiles, in order.
template <typename Emit>
void cut_tiles(const std::vector<Zone>& zones, const Order& order, int32_t N, int32_t block_m,
               Emit emit) {
  TapSet open;  // the union of the tile that is not yet full
  int64_t fill = 0;
  for (int32_t z : order) {
    const Zone& zone = zones[z];
    int64_t rest = static_cast<int64_t>(zone.h) * zone.w * N;
    if (fill > 0 && rest > 0) {
      const int64_t taken = std::min(rest, block_m - fill);
      for (size_t i = 0; i < open.size(); ++i) open[i] |= zone.taps[i];
      fill += taken;
      rest -= taken;
      if (fill == block_m) {
        emit(open, block_m, int64_t{1});
        fill = 0;
      }
    }
    if (rest >= block_m) emit(zone.taps, block_m, rest / block_m);
    if (rest % block_m > 0) {
      open = zone.taps;
      fill = rest % block_m;
    }
  }
  if (fill > 0) emit(open, static_cast<int32_t>(fill), int64_t{1});
}

// What the tiles cost: a tap of a tile is one, filled or not.
inline int64_t executed_taps(const std::vector<Zone>& zones, const Order& order, int32_t N,
                             int32_t block_m) {
  int64_t cost = 0;
  cut_tiles(zones, order, N, block_m, [&](const TapSet& taps, int32_t, int64_t num_tiles) {
    cost += size(taps) * num_tiles;
  });
  return cost;
}

// Moves zones, swaps two of them or reverses runs while that makes the tiles cheaper.
inline int64_t improve_order(Order& order, const std::vector<Zone>& zones, int32_t N,
                             int32_t block_m, int64_t good_enough, int64_t max_trials) {
  int64_t best = executed_taps(zones, order, N, block_m);
  const size_t n = order.size();
  Order trial;
  const auto keep_if_better = [&] {
    const int64_t cost = executed_taps(zones, trial, N, block_m);
    --max_trials;
    if (cost >= best) return false;
    best = cost;
    order = trial;
    return true;
  };
  for (bool improved = true; improved;) {
    improved = false;
    for (size_t i = 0; i + 1 < n; ++i) {
      for (size_t j = i + 1; j < n; ++j) {
        if (best <= good_enough || max_trials <= 0) return best;
        trial = order;
        std::rotate(trial.begin() + i, trial.begin() + i + 1, trial.begin() + j + 1);
        improved |= keep_if_better();
        trial = order;
        std::swap(trial[i], trial[j]);
        improved |= keep_if_better();
        trial = order;
        std::reverse(trial.begin() + i, trial.begin() + j + 1);
        improved |= keep_if_better();
      }
    }
  }
  return best;
}

// The better of two local optima: from the snake in which `zones` come, and from most to fewest
// taps. A search ends within 1 % of what pixels need, or after some 10 ms.
inline Order best_order(const std::vector<Zone>& zones, int32_t N, int32_t block_m) {
  Order order(zones.size());
  std::iota(order.begin(), order.end(), 0);
  Order by_size = order;
  std::stable_sort(by_size.begin(), by_size.end(),
                   [&](int32_t a, int32_t b) { return size(zones[a].taps) > size(zones[b].taps); });
  int64_t exact = 0;
  for (const Zone& zone : zones)
    exact += size(zone.taps) * static_cast<int64_t>(zone.h) * zone.w * N;
  const int64_t good_enough = exact / block_m + exact / block_m / 100;
  const int64_t max_trials = 2'000'000 / static_cast<int64_t>(zones.size() * zones[0].taps.size());
  const int64_t from_snake = improve_order(order, zones, N, block_m, good_enough, max_trials);
  if (from_snake <= good_enough) return order;
  const int64_t from_size = improve_order(by_size, zones, N, block_m, good_enough, max_trials);
  return from_size < from_snake ? by_size : order;
}

// The pixels and tiles of one output of a TileList, appended to it.
inline void append_tiles(TileList& list, const Plane& plane, const std::vector<Tap>& taps,
                         int32_t output, int32_t block_m) {
  const auto [N, H, W] = plane;
  const std::vector<Zone> zones = snake(taps, H, W);
  const Order order = best_order(zones, N, block_m);

  Tile tile = {output, static_cast<int32_t>(list.pixels.size()), 0, 0, 0};
  std::map<TapSet, int32_t> first_taps;  // where a set begins in list.taps
  cut_tiles(zones, order, N, block_m,
            [&](const TapSet& set, int32_t num_pixels, int64_t num_tiles) {
              const auto [entry, is_new] =
                  first_taps.emplace(set, static_cast<int32_t>(list.taps.size()));
              for (size_t t = 0; is_new && t < taps.size(); ++t)
                if (set[t / 64] >> t % 64 & 1) list.taps.push_back(taps[t]);
              tile.first_tap = entry->second;
              tile.num_taps = static_cast<int32_t>(size(set));
              tile.num_pixels = num_pixels;
              for (int64_t i = 0; i < num_tiles; ++i) {
                list.tiles.push_back(tile);
                tile.first_pixel += num_pixels;
              }
            });

  for (int32_t z : order) {
    const Zone& zone = zones[z];
    for (int32_t n = 0; n < N; ++n)
      for (int32_t y = zone.y; y < zone.y + zone.h; ++y)
        for (int32_t x = zone.x; x < zone.x + zone.w; ++x)
          list.pixels.push_back((n * H + y) * W + x);
  }
}

// Throws where pixels do not fit int32. Returns whether there are any.
inline bool check_plane(const Plane& plane, size_t num_outputs, int32_t block_m) {
  const auto [N, H, W] = plane;
  if (N < 0 || block_m < 1)
    throw std::invalid_argument("N must not be negative and block_m at least 1, got " +
                                std::to_string(N) + " and " + std::to_string(block_m));
  const double num_entries = static_cast<double>(num_outputs) * N * H * W;
  if (num_entries > std::numeric_limits<int32_t>::max())
    throw std::invalid_argument("branches * N * H * W must be below 2^31, got " +
                                std::to_string(num_entries));
  return num_entries > 0;
}

}  // namespace zones

// One output per branch, which is the sum of that branch's taps.
inline TileList list_forward_tiles(const Plane& plane, const std::vector<Branch>& branches,
                                   int32_t block_m = 128) {
  TileList list;
  const std::vector<Tap> taps = list_taps(branches, plane.H, plane.W, /*mirrored=*/false);
  if (!zones::check_plane(plane, branches.size(), block_m)) return list;
  list.pixels.reserve(branches.size() * static_cast<size_t>(plane.N) * plane.H * plane.W);
  for (size_t b = 0; b < branches.size(); ++b) {
    std::vector<Tap> own;
    std::copy_if(taps.begin(), taps.end(), std::back_inserter(own),
                 [&](const Tap& tap) { return tap.branch == static_cast<int32_t>(b); });
    zones::append_tiles(list, plane, own, static_cast<int32_t>(b), block_m);
  }
  return list;
}

// One output, the sum of the mirrored taps of all branches: their rates cut the map together.
inline TileList list_input_grad_tiles(const Plane& plane, const std::vector<Branch>& branches,
                                      int32_t block_m = 128) {
  TileList list;
  const std::vector<Tap> taps = list_taps(branches, plane.H, plane.W, /*mirrored=*/true);
  if (!zones::check_plane(plane, branches.empty() ? 0 : 1, block_m)) return list;
  list.pixels.reserve(static_cast<size_t>(plane.N) * plane.H * plane.W);
  zones::append_tiles(list, plane, taps, 0, block_m);
  return list;
}

namespace zones {

using Cuts = std::vector<int32_t>;  // the steps of a sum at which its pieces end

// Pieces of at most `limit` steps, equal within one.
struct EqualPieces {
  int64_t limit;

  Cuts operator()(int64_t steps) {
    const int64_t pieces = std::max<int64_t>(1, (steps + limit - 1) / limit);
    Cuts ends;
    for (int64_t p = 1; p <= pieces; ++p) ends.push_back(static_cast<int32_t>(steps * p / pieces));
    return ends;
  }
};

// The cost of an item besides its steps, counted in steps: `item` for each one, and `split` more
// for a piece of a split sum, which is written and read back.
struct Overheads {
  int32_t item, split;
};

// The wrap-around rule: workers are filled to `limit` one after another, and a sum that does not
// fit goes on with the next (McNaughton, "Scheduling with Deadlines and Loss Functions", 1959);
// but a piece costs its overheads, and none is shorter than that of a split.
struct WrapAround {
  int64_t limit;
  Overheads overheads;
  int64_t used = 0;  // of the worker

  Cuts operator()(int64_t steps) {
    const int64_t shortest = std::max<int64_t>(1, overheads.split);
    Cuts ends;
    for (int64_t begin = 0;;) {
      const int64_t rest = steps - begin;
      const int64_t cost = rest + overheads.item + (begin > 0 ? overheads.split : 0);
      const int64_t piece = limit - used - overheads.item - overheads.split;
      const bool can_cut = std::min(piece, rest - piece) >= shortest;
      if (used + cost <= limit || (used == 0 && !can_cut)) {
        used += cost;
        ends.push_back(static_cast<int32_t>(steps));
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

// The items of all blocks, jobs in order, cut by cut(steps).
template <typename Cut>
Schedule split(const std::vector<Job>& jobs, Cut cut) {
  Schedule schedule;
  for (size_t j = 0; j < jobs.size(); ++j) {
    for (int32_t block = 0; block < jobs[j].blocks; ++block) {
      const int32_t job = static_cast<int32_t>(j);
      const Cuts ends = cut(jobs[j].steps);
      if (ends.size() == 1) {
        schedule.items.push_back({job, block, 0, jobs[j].steps, -1, -1});
        continue;
      }
      const int32_t first_slot = static_cast<int32_t>(schedule.num_slots);
      int32_t begin = 0;
      for (int32_t end : ends) {
        schedule.items.push_back({job, block, begin, end - begin,
                                  static_cast<int32_t>(schedule.num_slots++),
                                  static_cast<int32_t>(schedule.reductions.size())});
        begin = end;
      }
      schedule.reductions.push_back({job, block, first_slot, static_cast<int32_t>(ends.size())});
    }
  }
  return schedule;
}

// Longest first, each to the worker that is free first.
inline void order_items(Schedule& schedule, int32_t num_workers, const Overheads& overheads) {
  std::stable_sort(schedule.items.begin(), schedule.items.end(),
                   [](const WorkItem& a, const WorkItem& b) { return a.num_steps > b.num_steps; });
  using Load = std::pair<int64_t, int32_t>;  // with its worker
  std::priority_queue<Load, std::vector<Load>, std::greater<Load>> loads;
  for (int32_t w = 0; w < num_workers; ++w) loads.push({0, w});
  for (const WorkItem& item : schedule.items) {
    const auto [begin, worker] = loads.top();
    const int64_t end =
        begin + item.num_steps + overheads.item + (item.slot < 0 ? 0 : overheads.split);
    loads.pop();
    loads.push({end, worker});
    schedule.workers.push_back(worker);
    schedule.makespan = std::max(schedule.makespan, end);
  }
}

}  // namespace zones

// Items of all jobs of one launch for `num_workers` thread blocks. Sums are split where the workers
// would otherwise finish unevenly: beside no splitting, equal pieces of at most two to a quarter of
// a worker's share of the steps are tried, and workers filled to one to one and a half shares; the
// earliest finish wins, by 1 % or more if it splits. split_overhead: how many steps it takes to
// write a partial sum and read it back. item_overhead: how many it takes to begin an item and to
// store its sums.
inline Schedule make_schedule(const std::vector<Job>& jobs, int32_t num_workers,
                              int32_t split_overhead, int32_t item_overhead) {
  if (num_workers < 1 || split_overhead < 0 || item_overhead < 0)
    throw std::invalid_argument(
        "num_workers must be at least 1, split_overhead and item_overhead not negative, got " +
        std::to_string(num_workers) + ", " + std::to_string(split_overhead) + " and " +
        std::to_string(item_overhead));
  const zones::Overheads overheads = {item_overhead, split_overhead};
  int64_t total = 0, longest = 1;
  for (const Job& job : jobs) {
    if (job.steps < 0 || job.blocks < 0)
      throw std::invalid_argument("steps and blocks of a job must not be negative, got " +
                                  std::to_string(job.steps) + " and " + std::to_string(job.blocks));
    total += (int64_t{job.steps} + item_overhead) * job.blocks;
    if (job.blocks > 0) longest = std::max<int64_t>(longest, job.steps);
  }
  const auto share = [&](int64_t sixty_fourths) {
    return std::max<int64_t>(1, total * sixty_fourths / (64 * int64_t{num_workers}));
  };
  Schedule whole = zones::split(jobs, zones::EqualPieces{longest});
  zones::order_items(whole, num_workers, overheads);
  Schedule best = whole;
  const auto keep_if_better = [&](Schedule trial) {
    zones::order_items(trial, num_workers, overheads);
    if (trial.makespan < best.makespan) best = std::move(trial);
  };
  for (int64_t part = 128; part >= 16; part -= 4)
    if (share(part) < longest) keep_if_better(zones::split(jobs, zones::EqualPieces{share(part)}));
  for (int64_t part = 64; part <= 96; ++part)
    keep_if_better(zones::split(jobs, zones::WrapAround{share(part), overheads}));
  return best.makespan + best.makespan / 100 < whole.makespan ? best : whole;
}

}  // namespace deeplab_fast
