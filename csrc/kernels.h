// The kernels of one x86-64 level as a table, so that the level is chosen once, when the extension is imported.
#pragma once

#include "momentum_update.h"

namespace semiseg {

struct Kernels {
  void (*momentum_update)(const MomentumUpdate&);
};

#define SEMISEG_DECLARE_LEVEL(level)                  \
  namespace level {                                   \
  void momentum_update(const MomentumUpdate&);        \
  inline constexpr Kernels kernels{momentum_update};  \
  }

SEMISEG_DECLARE_LEVEL(baseline)
SEMISEG_DECLARE_LEVEL(v3)
SEMISEG_DECLARE_LEVEL(v4)

}  // namespace semiseg
