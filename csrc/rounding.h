// Division that rounds up. Static, as every x86-64 level needs one of its own (see simd.h).
#pragma once

namespace semiseg {

template <class Number, class Divisor>
static constexpr auto ceil_div(Number n, Divisor divisor) {
  return (n + divisor - 1) / divisor;
}

template <class Number, class Divisor>
static constexpr auto round_up(Number n, Divisor to) {
  return ceil_div(n, to) * to;
}

}  // namespace semiseg
