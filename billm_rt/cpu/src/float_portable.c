/* The float32 operations for any instruction set. */
#define BILLM_FLOAT_OPS billm_float_portable
#include "float_ops.h"
