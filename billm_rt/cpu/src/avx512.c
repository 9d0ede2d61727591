#include "x86.h"
const struct billm_isa billm_avx512;
