// Asynchronous operations and copies: when they land, and which thread knows of it.

#include <algorithm>
#include <cstring>
#include <utility>

#include "machine.h"

namespace deeplab_fast::emulator {

namespace {

constexpr size_t kLineBytes = 16;  // the most that one copy brings

// Number of the line of the block's shared memory that holds p.
size_t line_of(const Block& block, const void* p) {
  return static_cast<size_t>(static_cast<const unsigned char*>(p) - block.shared->data()) /
         kLineBytes;
}

// Adds what was released at the address to what the thread knows.
void learn(Thread& thread, const void* address) {
  const auto found = thread.block->released.find(address);
  if (found == thread.block->released.end()) return;
  const IgnoreAccesses ignore;
  thread.knowledge.add(found->second);
}

// A sanitizer replaces memcpy and memset by functions that check both ranges.
void land(Copy& copy) {
  memcpy(copy.dst, copy.src, copy.src_bytes);
  memset(static_cast<char*>(copy.dst) + copy.src_bytes, 0, copy.bytes - copy.src_bytes);
  copy.landed = true;
}

// Lands the thread's copies up to number `last`.
void land_until(Thread& thread, int32_t last) {
  const auto covered = [&](const Copy& copy) { return copy.number <= last; };
  for (Copy& copy : thread.copies)
    if (covered(copy) && !copy.landed) land(copy);
  const IgnoreAccesses ignore;
  thread.copies.erase(std::remove_if(thread.copies.begin(), thread.copies.end(), covered),
                      thread.copies.end());
}

}  // namespace

void acquire(Thread& thread, void* address) {
  as(thread, [&] { tsan_acquire(address); });
  learn(thread, address);
}

void release(void* address) {
  tsan_release(address);
  const Knowledge& mine = machine.running->knowledge;
  if (mine.landed.empty() && mine.fence == 0) return;
  const IgnoreAccesses ignore;
  this_block().released[address].add(mine);
}

void acquire(void* address) {
  tsan_acquire(address);
  learn(*machine.running, address);
}

void start(const std::shared_ptr<Operation>& operation) {
  if (options.seed == 0) {
    land(*operation);
    return;
  }
  const IgnoreAccesses ignore;
  machine.operations.push_back(operation);
}

void land(Operation& operation) {
  if (operation.landed) return;
  operation.landed = true;
  const IgnoreAccesses ignore;
  auto& all = machine.operations;
  all.erase(std::remove_if(all.begin(), all.end(),
                           [&](const auto& other) { return other.get() == &operation; }),
            all.end());
  const std::function<void()> effect = std::exchange(operation.effect, nullptr);
  const bool outer = std::exchange(machine.landing, true);
  try {
    effect();
  } catch (const std::string& error) {
    if (machine.error.empty()) machine.error = error;
  }
  machine.landing = outer;
}

void land_any_operation() {
  const std::shared_ptr<Operation> operation =
      machine.operations[machine.random(machine.operations.size())];
  land(*operation);
}

void land_some(Thread& thread) {
  if (options.seed < 2) return;
  for (Copy& copy : thread.copies)
    if (!copy.landed && machine.random(4) == 0) land(copy);
  if (!machine.operations.empty() && machine.random(4) == 0) land_any_operation();
}

void add_unwaited(int operations) { machine.running->unwaited += operations; }

void copy_async(void* dst, const void* src, size_t bytes, size_t src_bytes) {
  Thread& thread = *machine.running;
  Copy copy{dst, src, bytes, src_bytes, ++thread.copies_started, false};
  if (options.seed == 0) {
    land(copy);
  } else {
    memset(dst, poison(), bytes);  // neither the old contents nor the new may be relied on
  }
  {
    const IgnoreAccesses ignore;
    thread.copies.push_back(copy);
    this_block().copied_lines.resize(shared_bytes() / kLineBytes + 1);
    this_block().copied_lines[line_of(this_block(), dst)] = {thread.number, copy.number};
  }
  land_some(thread);
}

void commit_copies() {
  Thread& thread = *machine.running;
  {
    const IgnoreAccesses ignore;
    thread.groups.push_back(thread.copies_started);
  }
  land_some(thread);
}

void wait_for_copies(int groups_left) {
  Thread& thread = *machine.running;
  const auto groups = static_cast<int>(thread.groups.size());
  if (groups <= groups_left) return;
  const int32_t last = thread.groups[groups - groups_left - 1];
  land_until(thread, last);
  const IgnoreAccesses ignore;
  thread.knowledge.add_landed(static_cast<size_t>(thread.number), last);
}

void after_copies(void* address, std::function<void()> arrive) {
  Thread& thread = *machine.running;
  const int32_t last = thread.copies_started;
  thread.copies_awaited = last;
  auto operation = std::make_shared<Operation>();
  operation->effect = [=, &thread] {
    as(thread, [&] {
      land_until(thread, last);
      tsan_release(address);
    });
    thread.block->released[address].add_landed(static_cast<size_t>(thread.number), last);
    arrive();
  };
  start(operation);
}

int32_t fence_proxies() {
  const IgnoreAccesses ignore;
  Knowledge& mine = machine.running->knowledge;
  mine.fenced = mine.landed;
  mine.fence = ++this_block().proxy_fences;
  return mine.fence;
}

int32_t last_fence_of_warp() {
  int32_t fence = INT32_MAX;
  const int first = machine.running->number / kWarpSize * kWarpSize;
  for (int i = first; i < first + kWarpSize; ++i)
    fence = std::min(fence, this_block().threads[i]->knowledge.fence);
  return fence;
}

int unfenced_copy(const void* p) {
  const Block& block = this_block();
  if (block.copied_lines.empty()) return -1;
  const auto [copier, number] = block.copied_lines[line_of(block, p)];
  const int warp = machine.running->number / kWarpSize;
  for (int i = 0; number > 0 && i < kWarpSize; ++i) {
    const std::vector<int32_t>& fenced = block.threads[warp * kWarpSize + i]->knowledge.fenced;
    if (static_cast<size_t>(copier) >= fenced.size() || fenced[copier] < number) return copier;
  }
  return -1;
}

void forget_copies(int rank, const void* p, size_t bytes) {
  Block& block = machine.blocks[rank];
  if (block.copied_lines.empty()) return;
  const size_t first = line_of(block, p);
  std::fill_n(block.copied_lines.begin() + static_cast<std::ptrdiff_t>(first), bytes / kLineBytes,
              CopiedLine{});
}

}  // namespace deeplab_fast::emulator
