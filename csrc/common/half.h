// Exact conversion of fp16 and bf16 bit patterns to float on the host, in plain integer operations
// that the compiler vectorises. It needs neither special instructions nor 16-bit types of the
// compiler.
#pragma once

#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace deeplab_fast {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

HOST_DEVICE float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

HOST_DEVICE uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

HOST_DEVICE float to_float(float value) { return value; }

HOST_DEVICE float to_float(BFloat16 value) {
  return bits_to_float(static_cast<uint32_t>(value.bits) << 16);
}

// Exponent and mantissa are shifted to their place in a float. Multiplying by 2^112 rebases the
// exponent and makes fp16 denormals normal, exactly. Inf and NaN need a float exponent of all ones.
HOST_DEVICE float to_float(Half value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
  uint32_t bits = float_to_bits(bits_to_float(magnitude) * 0x1p112f);
  if (magnitude >= 0x0f800000u) bits |= 0x7f800000u;
  return bits_to_float(bits | sign);
}

}  // namespace deeplab_fast
