// Submodule `schedule`: work lists of dilated convolution (csrc/schedule).

#include <pybind11/stl.h>

#include <array>
#include <type_traits>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "schedule/split_k.h"
#include "schedule/tap_tiles.h"

namespace deeplab_fast::bindings {
namespace {

using BranchRow = std::array<int32_t, 4>;  // kernel_H, kernel_W, dilation_H, dilation_W

// Converts structs of int32 to a buffer of [rows, fields].
template <typename Row>
py::bytearray int32_rows(const std::vector<Row>& rows) {
  static_assert(std::is_trivially_copyable_v<Row> && sizeof(Row) % sizeof(int32_t) == 0);
  return py::bytearray(reinterpret_cast<const char*>(rows.data()), rows.size() * sizeof(Row));
}

std::vector<schedule::Branch> to_branches(const std::vector<BranchRow>& rows) {
  std::vector<schedule::Branch> branches;
  for (const auto& row : rows) branches.push_back({row[0], row[1], row[2], row[3]});
  return branches;
}

}  // namespace

void bind_schedule(py::module_ m) {
  m.doc() = "Work lists of dilated convolution. Each list is a bytearray of int32 rows.";
  const auto def_tiles = [&](const char* name, auto list_tiles, const char* doc) {
    m.def(
        name,
        [list_tiles](std::array<int32_t, 3> plane, const std::vector<BranchRow>& rows,
                     int32_t block_m) {
          const std::vector<schedule::Branch> branches = to_branches(rows);
          schedule::TileList list;
          {
            py::gil_scoped_release release;
            list = list_tiles({plane[0], plane[1], plane[2]}, branches, block_m);
          }
          return py::make_tuple(int32_rows(list.pixels), int32_rows(list.taps),
                                int32_rows(list.tiles));
        },
        "plane"_a, "branches"_a, "block_m"_a = 128, doc);
  };
  def_tiles("forward_tiles", schedule::forward_tiles,
            "Pixels, taps and tiles of the forward pass: (N, H, W), [(kernel_H, kernel_W, "
            "dilation_H, dilation_W)].");
  def_tiles("input_grad_tiles", schedule::input_grad_tiles,
            "Pixels, taps and tiles of the input gradient, from the same arguments.");
  m.def(
      "tap_rectangles",
      [](std::array<int32_t, 2> size, const std::vector<BranchRow>& rows) {
        return int32_rows(schedule::tap_rectangles(to_branches(rows), size[0], size[1]));
      },
      "size"_a, "branches"_a, "Tap rectangles of the weight gradient: (H, W), branches.");
  m.def(
      "split_k",
      [](const std::vector<std::array<int32_t, 2>>& rows, int32_t num_ctas, int32_t split_cost,
         int32_t item_cost) {
        std::vector<schedule::TileWork> tiles;
        for (const auto& row : rows) tiles.push_back({row[0], row[1]});
        const schedule::WorkList list = schedule::split_k(tiles, num_ctas, split_cost, item_cost);
        return py::dict(
            "work_items"_a = int32_rows(list.work_items), "ctas"_a = int32_rows(list.ctas),
            "reductions"_a = int32_rows(list.reductions), "num_slots"_a = list.num_slots);
      },
      "tiles"_a, "num_ctas"_a, "split_cost"_a, "item_cost"_a = 0,
      "Work items, longest first, and the CTA of each, for pixel tiles of (k-iterations, channel "
      "blocks). Costs are in k-iterations.");
}

}  // namespace deeplab_fast::bindings
