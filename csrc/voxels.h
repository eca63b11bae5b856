// How a tensor [B, channels, *spatial] lies in memory, as the kernels see it.
#pragma once

#include <cstdint>

namespace semiseg {

enum class DataType : int {  // in the order of _DATA_TYPES in semiseg_kernels/native/extension.py
  float32, bfloat16, float16,
  bool8, uint8, int8, uint16, int16, uint32, int32, uint64, int64,
};

struct Voxels {
  bool present = false;  // an optional tensor may be absent
  void* data = nullptr;
  DataType type = DataType::float32;
  int64_t batch = 0, channels = 0, voxels = 0;  // voxels: of one image
  int64_t batch_stride = 0, channel_stride = 0, voxel_stride = 0;  // in elements; one of the last two is 1
};

inline int64_t bytes_per_element(DataType type) {
  switch (type) {
    case DataType::bool8: case DataType::uint8: case DataType::int8: return 1;
    case DataType::bfloat16: case DataType::float16: case DataType::uint16: case DataType::int16: return 2;
    case DataType::uint64: case DataType::int64: return 8;
    default: return 4;
  }
}

}  // namespace semiseg
