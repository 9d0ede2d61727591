/* The float32 operations for AVX2 with FMA. */
#define BILLM_FLOAT_OPS billm_float_avx2
#include "float_ops.h"
