#include "schedule/tap_tiles.h"

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <limits>
#include <map>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>

namespace deeplab_fast::schedule {
namespace {

// All taps of the branches, in order. `flipped` negates (dy, dx), for the input gradient: the
// gradient of input pixel p sums over output pixels p + (dy, dx).
std::vector<Tap> list_taps(const std::vector<Branch>& branches, int32_t H, int32_t W,
                           bool flipped) {
  if (H < 0 || W < 0)
    throw std::invalid_argument("H and W: expected no negative size, got " + std::to_string(H) +
                                " and " + std::to_string(W));
  const auto offset = [&](int32_t i, int32_t kernel, int32_t dilation, int32_t size) {
    const int64_t forward = static_cast<int64_t>(i - kernel / 2) * dilation;
    return static_cast<int32_t>(std::clamp<int64_t>(flipped ? -forward : forward, -size, size));
  };
  std::vector<Tap> taps;
  for (size_t b = 0; b < branches.size(); ++b) {
    const auto [kernel_H, kernel_W, dilation_H, dilation_W] = branches[b];
    if (kernel_H < 1 || kernel_W < 1 || kernel_H % 2 == 0 || kernel_W % 2 == 0)
      throw std::invalid_argument("kernel size: expected odd numbers, got " +
                                  std::to_string(kernel_H) + " x " + std::to_string(kernel_W));
    if (dilation_H < 1 || dilation_W < 1)
      throw std::invalid_argument("dilation: expected at least 1, got " +
                                  std::to_string(dilation_H) + " and " +
                                  std::to_string(dilation_W));
    for (int32_t r = 0; r < kernel_H; ++r)
      for (int32_t s = 0; s < kernel_W; ++s)
        taps.push_back({offset(r, kernel_H, dilation_H, H), offset(s, kernel_W, dilation_W, W),
                        static_cast<int32_t>(b), r * kernel_W + s});
  }
  return taps;
}

using TapSet = std::vector<uint64_t>;  // a bit per tap

int64_t size(const TapSet& set) {
  int64_t bits = 0;
  for (uint64_t word : set) bits += __builtin_popcountll(word);
  return bits;
}

struct Zone {
  int32_t y, x, h, w;
  TapSet taps;
};

// Coordinates at which a tap with one of the offsets enters or leaves [0, size), and both ends.
std::vector<int32_t> cut_points(std::vector<int32_t> offsets, int32_t size) {
  std::vector<int32_t> cuts = {0, size};
  for (int32_t d : offsets)
    if (d != 0 && std::abs(d) < size) cuts.push_back(d < 0 ? -d : size - d);
  std::sort(cuts.begin(), cuts.end());
  cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
  return cuts;
}

// Zones row by row, every second row backwards.
std::vector<Zone> snake(const std::vector<Tap>& taps, int32_t H, int32_t W) {
  std::vector<int32_t> dys, dxs;
  for (const Tap& tap : taps) {
    dys.push_back(tap.dy);
    dxs.push_back(tap.dx);
  }
  const std::vector<int32_t> ys = cut_points(dys, H), xs = cut_points(dxs, W);
  if (static_cast<double>(ys.size()) * xs.size() * taps.size() > 0x1p28)
    throw std::invalid_argument("kernel size: too many taps for a work list, got " +
                                std::to_string(taps.size()));
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

using Order = std::vector<int32_t>;  // indices of zones

// Calls emit(taps, num_pixels, num_tiles) for runs of equal tiles, in order.
template <typename Emit>
void cut_tiles(const std::vector<Zone>& zones, const Order& order, int32_t N, int32_t block_m,
               Emit emit) {
  TapSet open;  // the union of taps of the tile that is being filled
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

// Cost of the tiles: the sum of their numbers of taps. A partly filled tile costs as much as a full
// one.
int64_t executed_taps(const std::vector<Zone>& zones, const Order& order, int32_t N,
                      int32_t block_m) {
  int64_t cost = 0;
  cut_tiles(zones, order, N, block_m, [&](const TapSet& taps, int32_t, int64_t num_tiles) {
    cost += size(taps) * num_tiles;
  });
  return cost;
}

// Local search: moves a zone, swaps two zones or reverses a run of zones, as long as that lowers
// the cost. Returns the cost.
int64_t improve_order(Order& order, const std::vector<Zone>& zones, int32_t N, int32_t block_m,
                      int64_t good_enough, int64_t max_trials) {
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

// The better of two local optima: one starts from snake order, the order of `zones`, the other from
// most to fewest taps. A search ends within 1 % of the cost without any padding, or after about
// 10 ms.
Order best_order(const std::vector<Zone>& zones, int32_t N, int32_t block_m) {
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

// Appends the pixels and tiles of one output to `list`.
void append_tiles(TileList& list, const Plane& plane, const std::vector<Tap>& taps, int32_t output,
                  int32_t block_m) {
  const auto [N, H, W] = plane;
  const std::vector<Zone> zones = snake(taps, H, W);
  const Order order = best_order(zones, N, block_m);

  Tile tile = {output, static_cast<int32_t>(list.pixels.size()), 0, 0, 0};
  std::map<TapSet, int32_t> first_taps;  // the entry of list.taps at which a set begins
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

// Throws if the pixels of all outputs do not fit int32. Returns true if there are any pixels.
bool check_plane(const Plane& plane, size_t num_outputs, int32_t block_m) {
  const auto [N, H, W] = plane;
  if (N < 0 || block_m < 1)
    throw std::invalid_argument("N and block_m: expected at least 0 and at least 1, got " +
                                std::to_string(N) + " and " + std::to_string(block_m));
  const double num_entries = static_cast<double>(num_outputs) * N * H * W;
  if (num_entries > std::numeric_limits<int32_t>::max())
    throw std::invalid_argument("branches * N * H * W: expected less than 2^31, got " +
                                std::to_string(num_entries));
  return num_entries > 0;
}

}  // namespace

TileList forward_tiles(const Plane& plane, const std::vector<Branch>& branches, int32_t block_m) {
  TileList list;
  const std::vector<Tap> taps = list_taps(branches, plane.H, plane.W, /*flipped=*/false);
  if (!check_plane(plane, branches.size(), block_m)) return list;
  list.pixels.reserve(branches.size() * static_cast<size_t>(plane.N) * plane.H * plane.W);
  for (size_t b = 0; b < branches.size(); ++b) {
    std::vector<Tap> own;
    std::copy_if(taps.begin(), taps.end(), std::back_inserter(own),
                 [&](const Tap& tap) { return tap.branch == static_cast<int32_t>(b); });
    append_tiles(list, plane, own, static_cast<int32_t>(b), block_m);
  }
  return list;
}

TileList input_grad_tiles(const Plane& plane, const std::vector<Branch>& branches,
                          int32_t block_m) {
  TileList list;
  const std::vector<Tap> taps = list_taps(branches, plane.H, plane.W, /*flipped=*/true);
  if (!check_plane(plane, branches.empty() ? 0 : 1, block_m)) return list;
  list.pixels.reserve(static_cast<size_t>(plane.N) * plane.H * plane.W);
  append_tiles(list, plane, taps, 0, block_m);
  return list;
}

std::vector<TapRectangle> tap_rectangles(const std::vector<Branch>& branches, int32_t H,
                                         int32_t W) {
  std::vector<TapRectangle> rectangles;
  for (const Tap& tap : list_taps(branches, H, W, /*flipped=*/false)) {
    const int32_t h = H - std::abs(tap.dy), w = W - std::abs(tap.dx);
    if (h > 0 && w > 0) {
      rectangles.push_back({tap, std::max(0, -tap.dy), std::max(0, -tap.dx), h, w});
    } else {
      rectangles.push_back({tap, 0, 0, 0, 0});
    }
  }
  return rectangles;
}

}  // namespace deeplab_fast::schedule
