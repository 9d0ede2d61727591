/* The float32 operations for NEON. */
#define BILLM_FLOAT_OPS billm_float_neon
#include "float_ops.h"
