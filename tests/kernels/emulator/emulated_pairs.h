// Pairs of a 16-bit type, and its arithmetic that must not be used; included once for each of the two types.

struct __align__(4) EMULATED_HALF2 {
  EMULATED_HALF x, y;
};

inline EMULATED_HALF2 EMULATED_NAME(make_, 2)(EMULATED_HALF x, EMULATED_HALF y) { return {x, y}; }
inline EMULATED_HALF2 EMULATED_NAME(__halves2, 2)(EMULATED_HALF x, EMULATED_HALF y) { return {x, y}; }
inline EMULATED_HALF2 EMULATED_NAME(__floats2, 2_rn)(float x, float y) { return {x, y}; }
inline EMULATED_HALF2 EMULATED_NAME(__float22, 2_rn)(float2 v) { return {v.x, v.y}; }
inline float2 EMULATED_NAME(__, 22float2)(EMULATED_HALF2 v) { return {v.x, v.y}; }
inline float __low2float(EMULATED_HALF2 v) { return v.x; }
inline float __high2float(EMULATED_HALF2 v) { return v.y; }
inline EMULATED_HALF EMULATED_NAME(__low2, )(EMULATED_HALF2 v) { return v.x; }
inline EMULATED_HALF EMULATED_NAME(__high2, )(EMULATED_HALF2 v) { return v.y; }

EMULATED_HALF operator+(EMULATED_HALF, EMULATED_HALF) = delete;
EMULATED_HALF operator-(EMULATED_HALF, EMULATED_HALF) = delete;
EMULATED_HALF operator*(EMULATED_HALF, EMULATED_HALF) = delete;
EMULATED_HALF operator/(EMULATED_HALF, EMULATED_HALF) = delete;

#undef EMULATED_HALF
#undef EMULATED_HALF2
#undef EMULATED_NAME
