// Messages of a launch that fails.

#include <cstdio>
#include <cstring>

#include "machine.h"

namespace deeplab_fast::emulator {

std::string text(const char* format, va_list args) {
  char buffer[512];
  vsnprintf(buffer, sizeof(buffer), format, args);
  return buffer;
}

std::string text(const char* format, ...) {
  va_list args;
  va_start(args, format);
  std::string result = text(format, args);
  va_end(args);
  return result;
}

std::string describe(Site site) {
  const char* slash = strrchr(site.file, '/');
  return text("%s:%d", slash ? slash + 1 : site.file, site.line);
}

std::string describe(const char* what, uint3 index) {
  return text("%s (%u, %u, %u)", what, index.x, index.y, index.z);
}

static std::string describe(const Thread& thread) {
  if (thread.state == State::kExited) return "exited";
  return std::string("in ") + thread.function + " at " + describe(thread.site);
}

// The places of all threads: "; warp 0: lanes 0-15 in __syncthreads at a.cu:3, lanes 16-31 exited".
static std::string describe_warps(const Block& block) {
  std::string result;
  for (int first = 0; first < machine.num_threads; first += kWarpSize) {
    result += text("; warp %d:", first / kWarpSize);
    const int end = std::min(first + kWarpSize, machine.num_threads);
    for (int begin = first, i = first; i < end; ++i) {
      const std::string place = describe(*block.threads[i]);
      if (i + 1 < end && describe(*block.threads[i + 1]) == place) continue;
      result += text("%s lanes %d-%d ", begin > first ? "," : "", begin - first, i - first) + place;
      begin = i + 1;
    }
  }
  return result;
}

static std::string describe(const Block& block) { return describe("block", block.index); }

std::string describe_end() {
  std::string waiting;
  for (int i = 0; i < machine.num_blocks; ++i)
    waiting += (i > 0 ? "; " : "") + describe(machine.blocks[i]) + " waits for ever" +
               describe_warps(machine.blocks[i]);
  if (machine.num_exited < machine.num_blocks * machine.num_threads) return waiting;
  for (int i = 0; i < machine.num_blocks; ++i) {
    const SharedMemory& shared = *machine.blocks[i].shared;
    if (shared.guards_are_intact()) continue;
    return describe(machine.blocks[i]) +
           text(" wrote outside its %zu bytes of shared memory", shared.bytes());
  }
  if (machine.operations.empty()) return {};
  return describe(machine.blocks[0]) +
         text(" exited with %zu asynchronous operations in flight", machine.operations.size());
}

void abandon(const std::string& error) {
  {
    const IgnoreAccesses ignore;
    if (machine.landing) throw error;
    if (machine.error.empty()) machine.error = error;
  }
  machine.running->fiber.switch_to(machine.scheduler, /*dies=*/true);
  __builtin_unreachable();
}

void check_shared(const char* function, const void* address, size_t bytes, Site site) {
  const auto offset =
      reinterpret_cast<intptr_t>(address) - reinterpret_cast<intptr_t>(shared_memory());
  const auto end = static_cast<intptr_t>(shared_bytes());
  const auto size = static_cast<intptr_t>(bytes);
  if (offset < 0 || offset + size > end)
    fail(function, site, "offset %td is not in the %td bytes of shared memory", offset, end);
  if (offset % size != 0)
    fail(function, site, "offset %td in shared memory is no multiple of %td", offset, size);
}

void fail(const char* function, Site site, const char* format, ...) {
  va_list args;
  va_start(args, format);
  const std::string message = text(format, args);
  va_end(args);
  abandon(std::string(function) + " at " + describe(site) + ": " + message +
          describe(", thread", threadIdx) + describe(" of block", blockIdx));
}

}  // namespace deeplab_fast::emulator
