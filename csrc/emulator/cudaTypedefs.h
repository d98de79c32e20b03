// Takes the place of CUDA's header of this name.
#pragma once

#include "cuda.h"

using PFN_cuTensorMapEncodeTiled_v12000 = decltype(&deeplab_fast::emulator::encode_tiled);
