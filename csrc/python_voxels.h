// Voxels from Python: a tuple (address, data type, batch, channels, voxels, batch, channel and voxel stride), or None.
#pragma once

#include <pybind11/pybind11.h>

#include "voxels.h"

template <>
struct pybind11::detail::type_caster<semiseg::Voxels> {
  PYBIND11_TYPE_CASTER(semiseg::Voxels, const_name("tuple[int, ...] | None"));

  bool load(handle source, bool) {
    if (source.is_none()) {
      value = {};
      return true;
    }
    if (!isinstance<tuple>(source)) return false;
    const auto given = reinterpret_borrow<tuple>(source);
    if (given.size() != 8) return false;
    int64_t numbers[8];
    for (int i = 0; i < 8; ++i) numbers[i] = given[i].cast<int64_t>();
    const auto [data, type, batch, channels, voxels, batch_stride, channel_stride, voxel_stride] = numbers;
    value = {true,   reinterpret_cast<void*>(data), semiseg::DataType(type), batch,       channels,
             voxels, batch_stride,                  channel_stride,          voxel_stride};
    value.describe();
    return true;
  }
};
