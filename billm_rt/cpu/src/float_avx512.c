/* The float32 operations for AVX-512. */
#define BILLM_FLOAT_OPS billm_float_avx512
#include "float_ops.h"
