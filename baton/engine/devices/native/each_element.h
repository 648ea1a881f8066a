/* Includes BODY twice: with E as bf16 and as float. See element.h. No include guard, that is the point. */
#include "element.h"

#define E bf16
#define OF_E(name) name##_bf16
#define to_float bf16_to_float
#define from_float bf16_from_float
#define rounded bf16_rounded
#define E_IS_BF16 1
#include BODY
#undef E
#undef OF_E
#undef to_float
#undef from_float
#undef rounded
#undef E_IS_BF16

#define E float
#define OF_E(name) name##_f32
#define to_float f32_to_float
#define from_float f32_from_float
#define rounded f32_rounded
#define E_IS_BF16 0
#include BODY
#undef E
#undef OF_E
#undef to_float
#undef from_float
#undef rounded
#undef E_IS_BF16
#undef BODY
