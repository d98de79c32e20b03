// Shared memory of one block: poisoned when the block starts, between guards that show stray
// writes.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "sanitizers.h"
#include "simt.h"

namespace deeplab_fast::emulator {

// The byte that uninitialised memory is filled with. Even seeds: NaN in every float type, -1 in
// every integer. Odd seeds: small and positive in all of them, for kernels to which NaN or -1 means
// "not known".
inline unsigned char poison() { return options.seed % 2 == 0 ? 0xff : 0x3c; }

class SharedMemory {
 public:
  explicit SharedMemory(size_t bytes) : bytes_(bytes) {
    allocation_.resize(bytes + 2 * kGuardBytes + kAlignment, poison());
    const auto start = reinterpret_cast<uintptr_t>(allocation_.data()) + kGuardBytes;
    data_ = allocation_.data() + kGuardBytes + (-start & (kAlignment - 1));
    if (__asan_poison_memory_region) {
      __asan_poison_memory_region(data_ - kGuardBytes, kGuardBytes);
      __asan_poison_memory_region(data_ + bytes_, kGuardBytes);
    }
  }
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;
  ~SharedMemory() { open_guards(); }

  unsigned char* data() const { return data_; }
  size_t bytes() const { return bytes_; }

  bool guards_are_intact() const {
    open_guards();
    const auto poisoned = [](unsigned char byte) { return byte == poison(); };
    return std::all_of(data_ - kGuardBytes, data_, poisoned) &&
           std::all_of(data_ + bytes_, data_ + bytes_ + kGuardBytes, poisoned);
  }

 private:
  static constexpr size_t kGuardBytes = 4096;
  static constexpr size_t kAlignment = 1024;

  void open_guards() const {
    if (__asan_unpoison_memory_region)
      __asan_unpoison_memory_region(data_ - kGuardBytes, bytes_ + 2 * kGuardBytes);
  }

  std::vector<unsigned char> allocation_;
  unsigned char* data_;
  size_t bytes_;
};

}  // namespace deeplab_fast::emulator
