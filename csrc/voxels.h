// How a tensor [B, channels, *spatial] lies in memory, as the kernels see it.
#pragma once

#include <cstdint>

namespace semiseg {

enum class DataType : int {  // in the order of _DATA_TYPES in semiseg_kernels/native/extension.py
  float32, bfloat16, float16,
  bool8, uint8, int8, uint16, int16, uint32, int32, uint64, int64,
};

inline int64_t bytes_per_element(DataType type) {
  switch (type) {
    case DataType::bool8: case DataType::uint8: case DataType::int8: return 1;
    case DataType::bfloat16: case DataType::float16: case DataType::uint16: case DataType::int16: return 2;
    case DataType::uint64: case DataType::int64: return 8;
    default: return 4;
  }
}

struct Voxels {
  bool present = false;  // an optional tensor may be absent
  void* data = nullptr;
  DataType type = DataType::float32;
  int64_t batch = 0, channels = 0, voxels = 0;  // voxels: of one image
  int64_t batch_stride = 0, channel_stride = 0, voxel_stride = 0;  // in elements; one of the last two is 1

  // What follows, found once: a GPU's kernel would find it anew for every tile.
  bool aligned_rows = false;    // groups of four voxels of a channel start at multiples of their size
  bool aligned_points = false;  // groups of four channels of a voxel do
  bool chunked_rows = false;    // the voxels of every channel are adjacent, from a multiple of 16 bytes on
  bool packed_bytes = false;    // one channel of bytes, without gaps

  void describe() {
    const int64_t element = bytes_per_element(type), row_stride = voxel_stride == 1 ? channel_stride : voxel_stride;
    const auto are_aligned = [&](int64_t elements, int64_t bytes) {
      return uintptr_t(data) % uintptr_t(bytes) == 0 && row_stride % elements == 0 && batch_stride % elements == 0;
    };
    const bool fours = are_aligned(4, 4 * element);
    aligned_rows = voxel_stride == 1 && fours;
    aligned_points = voxel_stride != 1 && channel_stride == 1 && fours;
    chunked_rows = voxel_stride == 1 && are_aligned(16 / element, 16);
    packed_bytes = element == 1 && channels == 1 && (voxel_stride == 1 || voxels == 1) &&
                   (batch_stride == voxels || batch == 1);
  }
};

}  // namespace semiseg
