/* The Python extension: checks every buffer (format, contiguity, shape), then computes without the interpreter lock. */
#include "binding.h"

#include <stdlib.h>

/* ---- checks ---- */

static const char *format_name(const char *format) {
    static const char *const names[][2] = {{"B", "uint8"},   {"b", "int8"},    {"e", "float16"},
                                           {"f", "float32"}, {"d", "float64"}, {"h", "int16"},
                                           {"i", "int32"},   {"l", "int64"},   {"?", "bool"}};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (!strcmp(format, names[i][0]))
            return names[i][1];
    return format;
}

static void describe(char *text, size_t size, int ndim, const Py_ssize_t *shape) {
    size_t used = (size_t)PyOS_snprintf(text, size, "[");
    for (int i = 0; i < ndim && used < size - 24; i++)
        used += (size_t)PyOS_snprintf(text + used, size - used, i ? ", %lld" : "%lld", (long long)shape[i]);
    PyOS_snprintf(text + used, size - used, "]");
}

int billm_take(PyObject *object, const char *name, const char *formats, int ndim, Py_ssize_t *shape, int writable,
               Py_buffer *view) {
    int flags = PyBUF_FORMAT | PyBUF_C_CONTIGUOUS | (writable ? PyBUF_WRITABLE : 0);
    if (PyObject_GetBuffer(object, view, flags)) {
        if (PyErr_ExceptionMatches(PyExc_ValueError) || PyErr_ExceptionMatches(PyExc_BufferError)) {
            PyErr_Clear();
            PyErr_Format(PyExc_ValueError, "%s: wanted a C-contiguous%s array in native byte order", name,
                         writable ? ", writable" : "");
        }
        view->obj = NULL;
        return -1;
    }
    const char *format = view->format ? view->format : "B";
    if (format[0] == '\0' || format[1] != '\0' || !strchr(formats, format[0])) {
        char wanted[2] = {formats[0], 0}, other[2] = {formats[1], 0};
        PyErr_Format(PyExc_TypeError, "%s: wanted dtype %s%s%s, found %s", name, format_name(wanted),
                     other[0] ? " or " : "", format_name(other), format_name(format));
        return -1;
    }
    int fits = view->ndim == ndim;
    for (int i = 0; fits && i < ndim; i++)
        fits = shape[i] < 0 || shape[i] == view->shape[i];
    if (!fits) {
        char wanted[120], found[120];
        describe(wanted, sizeof wanted, ndim, shape);
        describe(found, sizeof found, view->ndim, view->shape);
        PyErr_Format(PyExc_ValueError, "%s: wanted shape %s, found %s (-1: any)", name, wanted, found);
        return -1;
    }
    memcpy(shape, view->shape, (size_t)ndim * sizeof *shape);
    return 0;
}

int billm_check_size(const char *name, Py_ssize_t value) {
    if (value >= 1 && value <= BILLM_MAX_SIZE)
        return 0;
    PyErr_Format(PyExc_ValueError, "%s: wanted 1 to %d, found %zd", name, BILLM_MAX_SIZE, value);
    return -1;
}

int billm_check_block(Py_ssize_t block) {
    if (block == 32 || block == 64 || block == 128 || block == 256)
        return 0;
    PyErr_Format(PyExc_ValueError, "block: wanted 32, 64, 128 or 256, found %zd", block);
    return -1;
}

int billm_check_bits(int bits) {
    if (bits == 8 || bits == 16)
        return 0;
    PyErr_Format(PyExc_ValueError, "bits: wanted 8 or 16, found %d", bits);
    return -1;
}

void billm_release(Py_buffer *views, size_t count) {
    for (size_t i = 0; i < count; i++)
        if (views[i].obj)
            PyBuffer_Release(&views[i]);
}

static size_t blocks_of(size_t cols, size_t block) {
    return (cols + block - 1) / block;
}

/* ---- products ---- */

enum { X, X_SCALE, OUT, ROW_SCALE, OPERANDS };

/* The kernels' digits, and that sums fit into 32 bits, rest on the range of the activations. */
static int check_range(const int16_t *x, size_t count, int bits) {
    const int top = (int)billm_top(bits);
    int outside = 0;
    for (size_t i = 0; i < count; i++)
        outside |= x[i] > top || x[i] < -top;
    if (outside)
        PyErr_Format(PyExc_ValueError, "x.values: wanted -%d to %d at %d bits, found others", top, top, bits);
    return outside ? -1 : 0;
}

/* Check the activations and the output against the weight, and multiply. `views` is the caller's to release. */
static PyObject *multiply(const struct billm_weight *weight, const struct billm_epilogue *epilogue, PyObject *x,
                          PyObject *x_scale, int bits, PyObject *out, Py_buffer *views) {
    Py_ssize_t x_shape[2] = {-1, (Py_ssize_t)weight->cols};
    if (billm_check_bits(bits) || billm_take(x, "x.values", "h", 2, x_shape, 0, &views[X]))
        return NULL;
    Py_ssize_t scale_shape[2] = {x_shape[0], (Py_ssize_t)weight->blocks};
    Py_ssize_t out_shape[2] = {x_shape[0], (Py_ssize_t)weight->rows};
    if (billm_take(x_scale, "x.scales", "f", 2, scale_shape, 0, &views[X_SCALE]) ||
        billm_take(out, "out", "f", 2, out_shape, 1, &views[OUT]))
        return NULL;
    if ((uintptr_t)views[X].buf % sizeof(int16_t) || (uintptr_t)views[X_SCALE].buf % sizeof(float) ||
        (uintptr_t)views[OUT].buf % sizeof(float)) {
        PyErr_SetString(PyExc_ValueError, "x.values, x.scales, out: wanted aligned memory");
        return NULL;
    }
    if (check_range(views[X].buf, (size_t)x_shape[0] * weight->cols, bits))
        return NULL;
    struct billm_tokens tokens = {views[X].buf, views[X_SCALE].buf, (size_t)x_shape[0], bits};
    struct billm_product product = {weight, *epilogue, views[OUT].buf, weight->rows, 0};
    int failed;
    Py_BEGIN_ALLOW_THREADS failed = billm_products(&product, 1, &tokens);
    Py_END_ALLOW_THREADS if (failed) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

/* ---- BinaryLinear: a weight checked once ---- */

enum { SIGN, SECOND, SALIENT, SCALES, SCALE, BIAS, TENSORS };

struct binary_linear {
    PyObject_HEAD struct billm_weight weight;
    struct billm_epilogue epilogue;
    struct billm_arranged arranged; /* the weight's */
    Py_buffer views[TENSORS];
};

static int take_weight(struct binary_linear *self, PyObject *const tensors[TENSORS]) {
    struct billm_weight *w = &self->weight;
    Py_ssize_t rows = (Py_ssize_t)w->rows, stride = (Py_ssize_t)w->stride, blocks = (Py_ssize_t)w->blocks;
    Py_ssize_t plane[2] = {rows, stride}, column[1] = {stride}, scales[3] = {rows, blocks, 4}, vector[1] = {rows};
    Py_buffer *views = self->views;
    if (billm_take(tensors[SIGN], "sign", "B", 2, plane, 0, &views[SIGN]) ||
        billm_take(tensors[SECOND], "second", "B", 2, plane, 0, &views[SECOND]) ||
        billm_take(tensors[SALIENT], "salient", "B", 1, column, 0, &views[SALIENT]) ||
        billm_take(tensors[SCALES], "scales", "B", 3, scales, 0, &views[SCALES]) ||
        billm_take(tensors[SCALE], "row_scale", "ef", 1, vector, 0, &views[SCALE]) ||
        (tensors[BIAS] != Py_None && billm_take(tensors[BIAS], "bias", "f", 1, vector, 0, &views[BIAS])))
        return -1;
    w->sign = views[SIGN].buf;
    w->second = views[SECOND].buf;
    w->salient = views[SALIENT].buf;
    w->scales = views[SCALES].buf;
    self->epilogue = (struct billm_epilogue){views[SCALE].buf, views[SCALE].itemsize == 2, views[BIAS].buf};
    return 0;
}

static PyObject *binary_linear_new(PyTypeObject *type, PyObject *args, PyObject *keywords) {
    PyObject *t[TENSORS];
    Py_ssize_t rows, cols, block;
    if (keywords && PyDict_Size(keywords)) {
        PyErr_SetString(PyExc_TypeError, "BinaryLinear takes no keyword arguments");
        return NULL;
    }
    if (!PyArg_ParseTuple(args, "OOOOOOnnn:BinaryLinear", &t[SIGN], &t[SECOND], &t[SALIENT], &t[SCALES], &t[SCALE],
                          &t[BIAS], &rows, &cols, &block) ||
        billm_check_size("rows", rows) || billm_check_size("cols", cols) || billm_check_block(block))
        return NULL;
    struct binary_linear *self = (struct binary_linear *)PyType_GenericAlloc(type, 0); /* zeroed */
    if (!self)
        return NULL;
    self->weight = (struct billm_weight){.rows = (size_t)rows, .cols = (size_t)cols, .block = (size_t)block};
    self->weight.blocks = blocks_of((size_t)cols, (size_t)block);
    self->weight.stride = 4 * blocks_of((size_t)cols, 32);
    self->weight.arranged = &self->arranged;
    if (take_weight(self, t)) {
        Py_DECREF((PyObject *)self);
        return NULL;
    }
    return (PyObject *)self;
}

static void binary_linear_dealloc(PyObject *object) {
    struct binary_linear *self = (struct binary_linear *)object;
    PyTypeObject *type = Py_TYPE(object);
    billm_release(self->views, TENSORS);
    billm_give_memory_back(&self->arranged);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(object);
    Py_DECREF((PyObject *)type);
}

static PyObject *binary_linear_multiply(PyObject *object, PyObject *const *args, Py_ssize_t count) {
    const struct binary_linear *self = (const struct binary_linear *)object;
    if (count != 5)
        return PyErr_Format(PyExc_TypeError, "multiply: wanted 5 arguments, found %zd", count);
    const long bits = PyLong_AsLong(args[2]);
    if (PyErr_Occurred())
        return NULL;
    Py_buffer views[OPERANDS] = {0};
    struct billm_epilogue epilogue = self->epilogue;
    if (args[4] != Py_None) {
        Py_ssize_t shape[1] = {(Py_ssize_t)self->weight.rows};
        if (billm_take(args[4], "row_scale", "f", 1, shape, 0, &views[ROW_SCALE])) {
            billm_release(views, OPERANDS);
            return NULL;
        }
        epilogue.scale = views[ROW_SCALE].buf;
        epilogue.scale_is_half = 0;
    }
    PyObject *result = multiply(&self->weight, &epilogue, args[0], args[1], (int)bits, args[3], views);
    billm_release(views, OPERANDS);
    return result;
}

static PyMethodDef binary_linear_methods[] = {
    {"multiply", (PyCFunction)(void (*)(void))binary_linear_multiply, METH_FASTCALL,
     "multiply(values, x_scales, bits, out, row_scale or None): write out [tokens, rows]"},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot binary_linear_slots[] = {
    {Py_tp_new, (void *)binary_linear_new},
    {Py_tp_dealloc, (void *)binary_linear_dealloc},
    {Py_tp_methods, binary_linear_methods},
    {0, NULL},
};

static PyObject *binary_linear_type; /* for billm_product_of */

int billm_product_of(PyObject *object, struct billm_product *product) {
    if (!PyObject_TypeCheck(object, (PyTypeObject *)binary_linear_type)) {
        PyErr_SetString(PyExc_TypeError, "wanted a BinaryLinear");
        return -1;
    }
    const struct binary_linear *self = (const struct binary_linear *)object;
    *product = (struct billm_product){.weight = &self->weight, .epilogue = self->epilogue};
    return 0;
}

static PyType_Spec binary_linear_spec = {
    .name = "billm_rt.cpu._native.BinaryLinear",
    .basicsize = sizeof(struct binary_linear),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = binary_linear_slots,
};

/* ---- functions ---- */

static PyObject *int8_linear(PyObject *module, PyObject *args) {
    (void)module;
    PyObject *weight, *scale, *x, *x_scale, *out;
    Py_ssize_t block;
    int bits;
    if (!PyArg_ParseTuple(args, "OOOOniO:int8_linear", &weight, &scale, &x, &x_scale, &block, &bits, &out) ||
        billm_check_block(block))
        return NULL;
    Py_buffer tensors[2] = {0}, views[OPERANDS] = {0};
    Py_ssize_t shape[2] = {-1, -1};
    PyObject *result = NULL;
    if (!billm_take(weight, "weight", "b", 2, shape, 0, &tensors[0]) &&
        !billm_take(scale, "scale", "ef", 1, shape, 0, &tensors[1]) && !billm_check_size("rows", shape[0]) &&
        !billm_check_size("cols", shape[1])) {
        struct billm_weight w = {.rows = (size_t)shape[0], .cols = (size_t)shape[1], .block = (size_t)block};
        w.stride = w.cols;
        w.blocks = blocks_of(w.cols, w.block);
        w.values = tensors[0].buf;
        struct billm_epilogue epilogue = {tensors[1].buf, tensors[1].itemsize == 2, NULL};
        result = multiply(&w, &epilogue, x, x_scale, bits, out, views);
    }
    billm_release(views, OPERANDS);
    billm_release(tensors, 2);
    return result;
}

static PyObject *int4_linear(PyObject *module, PyObject *args) {
    (void)module;
    PyObject *objects[3], *x, *x_scale, *out;
    Py_ssize_t cols;
    int bits;
    if (!PyArg_ParseTuple(args, "OOOnOOiO:int4_linear", &objects[0], &objects[1], &objects[2], &cols, &x, &x_scale,
                          &bits, &out) ||
        billm_check_size("cols", cols))
        return NULL;
    Py_buffer tensors[3] = {0}, views[OPERANDS] = {0};
    struct billm_weight w = {.cols = (size_t)cols, .block = BILLM_UNIT};
    w.blocks = blocks_of(w.cols, w.block);
    w.stride = 16 * w.blocks;
    Py_ssize_t shape[2] = {-1, (Py_ssize_t)w.stride}, steps[2] = {(Py_ssize_t)w.blocks, -1};
    PyObject *result = NULL;
    if (!billm_take(objects[0], "weight", "B", 2, shape, 0, &tensors[0]) && !billm_check_size("rows", shape[0])) {
        steps[1] = shape[0];
        if (!billm_take(objects[1], "step", "b", 2, steps, 0, &tensors[1]) &&
            !billm_take(objects[2], "scale", "ef", 1, shape, 0, &tensors[2])) {
            w.rows = (size_t)shape[0];
            w.nibbles = tensors[0].buf;
            w.steps = tensors[1].buf;
            struct billm_epilogue epilogue = {tensors[2].buf, tensors[2].itemsize == 2, NULL};
            result = multiply(&w, &epilogue, x, x_scale, bits, out, views);
        }
    }
    billm_release(views, OPERANDS);
    billm_release(tensors, 3);
    return result;
}

static PyObject *quantize_checked(PyObject *const objects[4], Py_ssize_t block, int bits, Py_buffer *views) {
    Py_ssize_t shape[2] = {-1, -1};
    if (billm_take(objects[0], "x", "f", 2, shape, 0, &views[0]) || billm_check_size("cols", shape[1]))
        return NULL;
    size_t cols = (size_t)shape[1];
    Py_ssize_t scales_shape[2] = {shape[0], (Py_ssize_t)blocks_of(cols, (size_t)block)};
    if ((objects[1] != Py_None && billm_take(objects[1], "col_scale", "f", 1, &shape[1], 0, &views[1])) ||
        billm_take(objects[2], "values", "h", 2, shape, 1, &views[2]) ||
        billm_take(objects[3], "scales", "f", 2, scales_shape, 1, &views[3]))
        return NULL;
    for (int i = 0; i < 4; i++)
        if ((uintptr_t)views[i].buf % (i == 2 ? sizeof(int16_t) : sizeof(float))) {
            PyErr_SetString(PyExc_ValueError, "x, col_scale, values, scales: wanted aligned memory");
            return NULL;
        }
    Py_BEGIN_ALLOW_THREADS billm_quantize(views[0].buf, views[1].buf, (size_t)shape[0], cols, (size_t)block, bits,
                                          views[2].buf, views[3].buf);
    Py_END_ALLOW_THREADS Py_RETURN_NONE;
}

static PyObject *quantize(PyObject *module, PyObject *args) {
    (void)module;
    PyObject *objects[4];
    Py_ssize_t block;
    int bits;
    if (!PyArg_ParseTuple(args, "OOniOO:quantize", &objects[0], &objects[1], &block, &bits, &objects[2], &objects[3]) ||
        billm_check_block(block) || billm_check_bits(bits))
        return NULL;
    Py_buffer views[4] = {0};
    PyObject *result = quantize_checked(objects, block, bits, views);
    billm_release(views, 4);
    return result;
}

static PyObject *isa(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    return PyUnicode_FromString(billm_selected());
}

static PyObject *allow_copies(PyObject *module, PyObject *args) {
    (void)module;
    int allowed;
    if (!PyArg_ParseTuple(args, "p:allow_copies", &allowed))
        return NULL;
    billm_allow_copies(allowed);
    Py_RETURN_NONE;
}

static PyObject *few_tokens(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    return PyLong_FromSize_t(billm_few_tokens());
}

static PyObject *supported_isas(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    const char *names[BILLM_ISAS];
    size_t count = billm_supported(names);
    PyObject *result = PyTuple_New((Py_ssize_t)count);
    for (size_t i = 0; result && i < count; i++) {
        PyObject *name = PyUnicode_FromString(names[i]);
        if (!name || PyTuple_SetItem(result, (Py_ssize_t)i, name))
            Py_CLEAR(result);
    }
    return result;
}

static PyObject *select_isa(PyObject *module, PyObject *args) {
    (void)module;
    PyObject *name;
    if (!PyArg_ParseTuple(args, "U:select_isa", &name))
        return NULL;
    const char *text = PyUnicode_AsUTF8AndSize(name, NULL);
    if (!text)
        return NULL;
    if (billm_select(text))
        return PyErr_Format(PyExc_ValueError, "instruction set %R is not one that this machine can run", name);
    Py_RETURN_NONE;
}

static PyObject *set_threads(PyObject *module, PyObject *args) {
    (void)module;
    int count;
    if (!PyArg_ParseTuple(args, "i:set_threads", &count))
        return NULL;
    Py_BEGIN_ALLOW_THREADS billm_pool_set_threads(count);
    Py_END_ALLOW_THREADS Py_RETURN_NONE;
}

static PyObject *threads(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    return PyLong_FromLong(billm_pool_threads());
}

static PyMethodDef methods[] = {
    {"int8_linear", int8_linear, METH_VARARGS, "int8_linear(weight, scale, values, x_scales, block, bits, out)"},
    {"int4_linear", int4_linear, METH_VARARGS, "int4_linear(weight, step, scale, cols, values, x_scales, bits, out)"},
    {"quantize", quantize, METH_VARARGS, "quantize(x, col_scale or None, block, bits, values, scales)"},
    {"isa", isa, METH_NOARGS, "Return the name of the instruction set in use."},
    {"allow_copies", allow_copies, METH_VARARGS, "Whether planes may be put into another order, which takes memory."},
    {"few_tokens", few_tokens, METH_NOARGS, "Return how many tokens at once are read from arranged weights, at most."},
    {"supported_isas", supported_isas, METH_NOARGS, "Return the names of those this machine can run, best first."},
    {"select_isa", select_isa, METH_VARARGS, "Use the instruction set of this name."},
    {"set_threads", set_threads, METH_VARARGS, "Use this many threads, the caller's included."},
    {"threads", threads, METH_NOARGS, "Return how many threads are used."},
    {NULL, NULL, 0, NULL},
};

static int execute(PyObject *module) {
    PyObject *type = PyType_FromSpec(&binary_linear_spec);
    int failed = !type || PyModule_AddObjectRef(module, "BinaryLinear", type) || billm_add_decoder(module);
    Py_XDECREF(binary_linear_type);
    binary_linear_type = type;
    return failed ? -1 : 0;
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, (void *)execute}, {0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_native",
    .m_methods = methods,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__native(void) {
    return PyModuleDef_Init(&definition);
}
