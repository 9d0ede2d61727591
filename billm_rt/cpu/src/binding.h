/* What the parts of the Python extension share. */
#ifndef BILLM_BINDING_H
#define BILLM_BINDING_H

#define Py_LIMITED_API 0x030b0000
#include <Python.h>

#include "kernels.h"

enum { BILLM_MAX_SIZE = 1 << 24 };

/* Take a C-contiguous buffer of one of `formats` (a letter each) and exactly `shape`; where that is -1, fill it in.
 * On failure an exception is set and view->obj is NULL. */
int billm_take(PyObject *object, const char *name, const char *formats, int ndim, Py_ssize_t *shape, int writable,
               Py_buffer *view);
void billm_release(Py_buffer *views, size_t count);
int billm_check_block(Py_ssize_t block);
int billm_check_bits(int bits);
int billm_check_size(const char *name, Py_ssize_t value);

/* Fill in weight and epilogue of a BinaryLinear, which must outlive the product; TypeError for anything else. */
int billm_product_of(PyObject *object, struct billm_product *product);

/* Add the type Decoder to the module. */
int billm_add_decoder(PyObject *module);

#endif
