/* The type Decoder: layers checked once, then run without the interpreter lock. */
#include "binding.h"
#include "decoder.h"

#include <stdlib.h>

/* Six norms; column scales of q, k, v, o, gate, up and down. Two of the last norm; codes, steps and scales of the head. */
enum { VIEWS_PER_LAYER = 13, VIEWS_OF_HEAD = 5 };

struct decoder {
    PyObject_HEAD struct billm_decoder decoder;
    PyObject *parts; /* the tuple of layers: keeps their BinaryLinears */
    Py_buffer *views;
    size_t view_count;
};

static int check_tuple(PyObject *object, const char *name) {
    if (PyTuple_Check(object))
        return 0;
    PyErr_Format(PyExc_TypeError, "%s: wanted a tuple, found %R", name, (PyObject *)Py_TYPE(object));
    return -1;
}

/* ---- construction ---- */

/* The float32 vector [n] behind `object`, NULL for None. The memory map aligns tensors; others must be aligned too. */
static int take_vector(struct decoder *self, PyObject *object, const char *name, size_t n, const float **out) {
    Py_ssize_t shape[1] = {(Py_ssize_t)n};
    *out = NULL;
    if (object == Py_None)
        return 0;
    Py_buffer *view = &self->views[self->view_count++]; /* zeroed, so it can be released even if this fails */
    if (billm_take(object, name, "f", 1, shape, 0, view))
        return -1;
    if ((uintptr_t)view->buf % sizeof(float)) {
        PyErr_Format(PyExc_ValueError, "%s: wanted memory aligned to 4 bytes", name);
        return -1;
    }
    *out = view->buf;
    return 0;
}

static int take_norm(struct decoder *self, PyObject *weight, PyObject *bias, const char *name, struct billm_norm *out) {
    size_t hidden = self->decoder.hidden;
    if (weight == Py_None) {
        PyErr_Format(PyExc_TypeError, "%s: wanted a weight, found None", name);
        return -1;
    }
    return take_vector(self, weight, name, hidden, &out->weight) || take_vector(self, bias, name, hidden, &out->bias)
               ? -1
               : 0;
}

static int take_member(PyObject *object, size_t cols, size_t block, const size_t rows[3], const char *name,
                       struct billm_input *input) {
    Py_ssize_t place;
    PyObject *linear;
    if (check_tuple(object, name) || !PyArg_ParseTuple(object, "nO", &place, &linear) ||
        billm_product_of(linear, &input->products[input->count]))
        return -1;
    const struct billm_weight *w = input->products[input->count].weight;
    if (place < 0 || place > 2 || w->rows != rows[place] || w->cols != cols || w->block != block) {
        PyErr_Format(PyExc_ValueError, "%s: place %zd: a Linear [%zu, %zu] of block %zu does not fit", name, place,
                     w->rows, w->cols, w->block);
        return -1;
    }
    input->place[input->count++] = (size_t)place;
    return 0;
}

static int take_input(struct decoder *self, PyObject *object, size_t cols, const size_t rows[3], const char *name,
                      struct billm_input *input) {
    Py_ssize_t block;
    PyObject *scale, *members;
    if (check_tuple(object, name) || !PyArg_ParseTuple(object, "nOO!", &block, &scale, &PyTuple_Type, &members) ||
        billm_check_block(block) || take_vector(self, scale, name, cols, &input->col_scale))
        return -1;
    input->block = (size_t)block;
    const Py_ssize_t count = PyTuple_Size(members);
    if (count < 1 || count > 3) {
        PyErr_Format(PyExc_ValueError, "%s: wanted 1 to 3 Linears, found %zd", name, count);
        return -1;
    }
    for (Py_ssize_t i = 0; i < count; i++)
        if (take_member(PyTuple_GetItem(members, i), cols, input->block, rows, name, input))
            return -1;
    return 0;
}

/* `rows` ends with zeros where a group has fewer than three Linears; each place must be filled once. */
static int take_group(struct decoder *self, PyObject *object, size_t cols, const size_t rows[3], const char *name,
                      struct billm_group *group) {
    unsigned wanted = 0, found = 0;
    if (check_tuple(object, name))
        return -1;
    const Py_ssize_t count = PyTuple_Size(object);
    if (count < 1 || count > 3) {
        PyErr_Format(PyExc_ValueError, "%s: wanted 1 to 3 inputs, found %zd", name, count);
        return -1;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        struct billm_input *input = &group->inputs[group->count++];
        if (take_input(self, PyTuple_GetItem(object, i), cols, rows, name, input))
            return -1;
        for (size_t j = 0; j < input->count; j++)
            found += 1u << 4 * input->place[j]; /* a place that comes twice shows */
    }
    for (int place = 0; place < 3; place++)
        wanted += rows[place] ? 1u << 4 * place : 0;
    if (wanted != found) {
        PyErr_Format(PyExc_ValueError, "%s: wanted every Linear once", name);
        return -1;
    }
    return 0;
}

static int take_layer(struct decoder *self, PyObject *object, struct billm_layer *layer) {
    const struct billm_decoder *d = &self->decoder;
    const size_t query = d->heads * d->width, kv = d->kv_heads * d->width;
    const size_t qkv[3] = {query, kv, kv}, hidden[3] = {d->hidden};
    const size_t up[3] = {d->intermediate, d->gated ? d->intermediate : 0};
    PyObject *norms[6], *groups[4];
    if (check_tuple(object, "layer") || !PyArg_ParseTuple(object, "OOOOOOOOOO", &norms[0], &norms[1], &norms[2], &norms[3], &norms[4], &norms[5],
                          &groups[0], &groups[1], &groups[2], &groups[3]) ||
        take_norm(self, norms[0], norms[1], "attn_norm", &layer->attn_norm) ||
        take_norm(self, norms[2], norms[3], "mlp_norm", &layer->mlp_norm) ||
        take_vector(self, norms[4], "q_norm", d->width, &layer->q_norm) ||
        take_vector(self, norms[5], "k_norm", d->width, &layer->k_norm) ||
        take_group(self, groups[0], d->hidden, qkv, "qkv", &layer->qkv) ||
        take_group(self, groups[1], query, hidden, "o", &layer->o) ||
        take_group(self, groups[2], d->hidden, up, "up", &layer->up) ||
        take_group(self, groups[3], d->intermediate, hidden, "down", &layer->down))
        return -1;
    return 0;
}

/* The table of the head: codes of 4 bits with steps, or of 8 bits in blocks of `block` columns of the activations. */
static int take_table(struct decoder *self, PyObject *weight, PyObject *step, PyObject *scale, Py_ssize_t block) {
    struct billm_head *head = &self->decoder.head;
    const size_t cols = self->decoder.hidden;
    Py_buffer *views = self->views + self->view_count;
    const int nibbles = step != Py_None;
    struct billm_weight table = {.cols = cols, .block = nibbles ? BILLM_UNIT : (size_t)block};
    if (billm_check_block((Py_ssize_t)table.block))
        return -1;
    table.blocks = (cols + table.block - 1) / table.block;
    table.stride = nibbles ? 16 * table.blocks : cols;
    Py_ssize_t shape[2] = {-1, (Py_ssize_t)table.stride}, steps[2] = {(Py_ssize_t)table.blocks, -1};
    self->view_count += 3; /* zeroed, as above */
    if (billm_take(weight, "head weight", nibbles ? "B" : "b", 2, shape, 0, &views[0]) ||
        billm_check_size("rows of the head", shape[0]) ||
        billm_take(scale, "head scale", "ef", 1, shape, 0, &views[1]))
        return -1;
    steps[1] = shape[0];
    if (nibbles && billm_take(step, "head step", "b", 2, steps, 0, &views[2]))
        return -1;
    table.rows = (size_t)shape[0];
    table.values = nibbles ? NULL : views[0].buf;
    table.nibbles = nibbles ? views[0].buf : NULL;
    table.steps = views[2].buf;
    head->table = table;
    head->epilogue = (struct billm_epilogue){views[1].buf, views[1].itemsize == 2, NULL};
    return 0;
}

static int take_head(struct decoder *self, PyObject *object) {
    const size_t hidden = self->decoder.hidden;
    PyObject *norm, *bias, *weight, *step, *scale;
    Py_ssize_t block;
    if (object == Py_None)
        return 0;
    if (check_tuple(object, "head") ||
        !PyArg_ParseTuple(object, "OOOOOn", &norm, &bias, &weight, &step, &scale, &block) ||
        take_vector(self, norm, "final norm", hidden, &self->decoder.head.norm.weight) ||
        take_vector(self, bias, "final norm's bias", hidden, &self->decoder.head.norm.bias))
        return -1;
    return take_table(self, weight, step, scale, block);
}

static int check_sizes(const struct billm_decoder *d, Py_ssize_t window, int activation) {
    const size_t sizes[] = {d->hidden, d->intermediate, d->heads, d->kv_heads};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        if (billm_check_size("a size of the decoder", (Py_ssize_t)sizes[i]))
            return -1;
    if (d->width < 1 || d->width > BILLM_MAX_WIDTH)
        PyErr_Format(PyExc_ValueError, "head width: wanted 1 to %d, found %zu", BILLM_MAX_WIDTH, d->width);
    else if (d->heads % d->kv_heads || d->heads * d->width > BILLM_MAX_SIZE)
        PyErr_Format(PyExc_ValueError, "heads: %zu of width %zu do not go with %zu", d->heads, d->width, d->kv_heads);
    else if (window < 0 || window > BILLM_MAX_SIZE || activation < BILLM_SILU || activation > BILLM_RELU)
        PyErr_Format(PyExc_ValueError, "window %zd or activation %d: out of range", window, activation);
    else
        return billm_check_bits(d->activation_bits);
    return -1;
}

static int build(struct decoder *self, PyObject *layers, PyObject *head) {
    struct billm_decoder *d = &self->decoder;
    d->layer_count = (size_t)PyTuple_Size(layers);
    d->layers = calloc(d->layer_count + 1, sizeof *d->layers);
    self->views = calloc(d->layer_count * VIEWS_PER_LAYER + VIEWS_OF_HEAD, sizeof *self->views);
    if (!d->layers || !self->views) {
        PyErr_NoMemory();
        return -1;
    }
    for (size_t i = 0; i < d->layer_count; i++)
        if (take_layer(self, PyTuple_GetItem(layers, (Py_ssize_t)i), &d->layers[i]))
            return -1;
    if (take_head(self, head))
        return -1;
    Py_INCREF(layers);
    self->parts = layers;
    return 0;
}

static PyObject *decoder_new(PyTypeObject *type, PyObject *args, PyObject *keywords) {
    Py_ssize_t hidden, intermediate, heads, kv_heads, width, window;
    int post_norm, gated, activation, bits;
    float eps;
    PyObject *layers, *head;
    if (keywords && PyDict_Size(keywords)) {
        PyErr_SetString(PyExc_TypeError, "Decoder takes no keyword arguments");
        return NULL;
    }
    if (!PyArg_ParseTuple(args, "(nnnnnn)fppiiO!O:Decoder", &hidden, &intermediate, &heads, &kv_heads, &width, &window,
                          &eps, &post_norm, &gated, &activation, &bits, &PyTuple_Type, &layers, &head))
        return NULL;
    struct decoder *self = (struct decoder *)PyType_GenericAlloc(type, 0); /* zeroed */
    if (!self)
        return NULL;
    self->decoder = (struct billm_decoder){.hidden = (size_t)hidden,
                                           .intermediate = (size_t)intermediate,
                                           .heads = (size_t)heads,
                                           .kv_heads = (size_t)kv_heads,
                                           .width = (size_t)width,
                                           .window = (size_t)window,
                                           .norm_eps = eps,
                                           .post_norm = post_norm,
                                           .gated = gated,
                                           .activation_bits = bits};
    if (check_sizes(&self->decoder, window, activation) || build(self, layers, head)) {
        Py_DECREF((PyObject *)self);
        return NULL;
    }
    self->decoder.activation = (enum billm_activation)activation;
    return (PyObject *)self;
}

static void decoder_dealloc(PyObject *object) {
    struct decoder *self = (struct decoder *)object;
    PyTypeObject *type = Py_TYPE(object);
    billm_release(self->views, self->view_count);
    free(self->views);
    free(self->decoder.layers);
    free(self->decoder.scratch);
    Py_XDECREF(self->parts);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(object);
    Py_DECREF((PyObject *)type);
}

/* ---- running ---- */

enum { X, COS, SIN, LOGITS, OPERANDS };

/* The (data, scale) arrays of one layer, for `end` positions. */
static int take_cache(const struct billm_decoder *d, PyObject *pair, size_t end, Py_buffer views[2],
                      struct billm_cache *out) {
    PyObject *data, *scale;
    if (check_tuple(pair, "cache") || !PyArg_ParseTuple(pair, "OO", &data, &scale))
        return -1;
    Py_ssize_t shape[4] = {2, (Py_ssize_t)d->kv_heads, -1, (Py_ssize_t)d->width};
    if (billm_take(data, "cache data", "hb", 4, shape, 1, &views[0]) ||
        billm_take(scale, "cache scale", "f", 3, shape, 1, &views[1]))
        return -1;
    const size_t capacity = (size_t)shape[2], heads = d->kv_heads * capacity;
    if (capacity % BILLM_KEY_GROUP || capacity < end || capacity > BILLM_MAX_SIZE) {
        PyErr_Format(PyExc_ValueError, "cache: wanted room for %zu tokens, a multiple of %d, found %zu", end,
                     BILLM_KEY_GROUP, capacity);
        return -1;
    }
    const Py_ssize_t size = views[0].itemsize;
    if ((uintptr_t)views[0].buf % (size_t)size || (uintptr_t)views[1].buf % sizeof(float)) {
        PyErr_SetString(PyExc_ValueError, "cache: wanted aligned memory");
        return -1;
    }
    *out = (struct billm_cache){.keys = views[0].buf,
                                .key_scale = views[1].buf,
                                .value_scale = (float *)views[1].buf + heads,
                                .capacity = capacity,
                                .bits = (int)(8 * size)};
    out->values = billm_cache_element(out, out->keys, heads * d->width);
    return 0;
}

static int take_operands(const struct billm_decoder *d, PyObject *x, PyObject *cos, PyObject *sin, PyObject *logits,
                         Py_buffer *views, size_t *tokens) {
    Py_ssize_t shape[2] = {-1, (Py_ssize_t)d->hidden};
    if (billm_take(x, "x", "f", 2, shape, 1, &views[X]))
        return -1;
    Py_ssize_t angles[2] = {shape[0], (Py_ssize_t)d->width / 2};
    if ((cos == Py_None) != (sin == Py_None) || (cos != Py_None && d->width % 2)) {
        PyErr_SetString(PyExc_ValueError, "cos, sin: wanted both, and a head of even width, or neither");
        return -1;
    }
    if (cos != Py_None && (billm_take(cos, "cos", "f", 2, angles, 0, &views[COS]) ||
                           billm_take(sin, "sin", "f", 2, angles, 0, &views[SIN])))
        return -1;
    if (logits != Py_None) {
        Py_ssize_t wanted[2] = {shape[0], (Py_ssize_t)d->head.table.rows};
        if (!d->head.table.rows)
            PyErr_SetString(PyExc_ValueError, "logits: this decoder was made without a head");
        if (!d->head.table.rows || billm_take(logits, "logits", "f", 2, wanted, 1, &views[LOGITS]))
            return -1;
    }
    for (int i = 0; i < OPERANDS; i++)
        if ((uintptr_t)views[i].buf % sizeof(float)) {
            PyErr_SetString(PyExc_ValueError, "x, cos, sin, logits: wanted memory aligned to 4 bytes");
            return -1;
        }
    *tokens = (size_t)shape[0];
    return 0;
}

/* What a run takes from its tuples of starts and of caches; `views` are the caches'. */
struct places {
    size_t texts, layers;
    size_t *starts;
    struct billm_cache *caches;
    Py_buffer *views;
};

static int make_places(PyObject *starts, PyObject *caches, struct places *out) {
    const size_t texts = (size_t)PyTuple_Size(starts), pairs = (size_t)PyTuple_Size(caches);
    if (!texts || pairs % texts) {
        PyErr_Format(PyExc_ValueError, "caches: wanted one for each layer and text, found %zu for %zu texts", pairs, texts);
        return -1;
    }
    out->texts = texts;
    out->layers = pairs / texts;
    out->starts = calloc(texts, sizeof *out->starts);
    out->caches = calloc(pairs + 1, sizeof *out->caches);
    out->views = calloc(2 * pairs + 1, sizeof *out->views);
    if (!out->starts || !out->caches || !out->views) {
        PyErr_NoMemory();
        return -1;
    }
    for (size_t i = 0; i < texts; i++) {
        const Py_ssize_t start = PyLong_AsSsize_t(PyTuple_GetItem(starts, (Py_ssize_t)i));
        if (start == -1 && PyErr_Occurred())
            return -1;
        if (start < 0 || start > BILLM_MAX_SIZE) {
            PyErr_Format(PyExc_ValueError, "start %zd: out of range", start);
            return -1;
        }
        out->starts[i] = (size_t)start;
    }
    return 0;
}

static void free_places(struct places *places) {
    if (places->views)
        billm_release(places->views, 2 * places->layers * places->texts);
    free(places->views);
    free(places->caches);
    free(places->starts);
}

static PyObject *run_checked(struct decoder *self, PyObject *const *args, Py_ssize_t first, Py_buffer *views,
                             struct places *places) {
    struct billm_decoder *d = &self->decoder;
    size_t tokens;
    if (make_places(args[1], args[5], places) || take_operands(d, args[0], args[2], args[3], args[6], views, &tokens))
        return NULL;
    if (tokens > BILLM_MAX_SIZE || first < 0 || (size_t)first + places->layers > d->layer_count)
        return PyErr_Format(PyExc_ValueError, "layers %zd to %zd: out of range", first,
                            first + (Py_ssize_t)places->layers);
    if (places->texts > 1 && places->texts != tokens)
        return PyErr_Format(PyExc_ValueError, "wanted a token for each of %zu texts, found %zu", places->texts, tokens);
    const size_t each = places->texts > 1 ? 1 : tokens;
    for (size_t i = 0; i < places->layers * places->texts; i++)
        if (take_cache(d, PyTuple_GetItem(args[5], (Py_ssize_t)i), places->starts[i % places->texts] + each,
                       places->views + 2 * i, &places->caches[i]))
            return NULL;
    int failed = 0;
    if (tokens) {
        const struct billm_texts texts = {places->texts, places->starts, places->caches};
        Py_BEGIN_ALLOW_THREADS failed = billm_decode(d, views[X].buf, tokens, texts, views[COS].buf, views[SIN].buf,
                                                     (size_t)first, places->layers, views[LOGITS].buf);
        Py_END_ALLOW_THREADS
    }
    if (failed)
        return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyObject *decoder_run(PyObject *object, PyObject *const *args, Py_ssize_t count) {
    struct decoder *self = (struct decoder *)object;
    if (count != 7 || !PyTuple_Check(args[1]) || !PyTuple_Check(args[5]))
        return PyErr_Format(PyExc_TypeError,
                            "run: wanted x, a tuple of starts, cos, sin, first, a tuple of caches, and logits");
    const Py_ssize_t first = PyLong_AsSsize_t(args[4]);
    if (PyErr_Occurred())
        return NULL;
    Py_buffer views[OPERANDS] = {0};
    struct places places = {0};
    PyObject *result = run_checked(self, args, first, views, &places);
    free_places(&places);
    billm_release(views, OPERANDS);
    return result;
}

static PyObject *decoder_copied_bytes(PyObject *object, PyObject *unused) {
    const struct billm_decoder *d = &((struct decoder *)object)->decoder;
    size_t bytes;
    (void)unused;
    Py_BEGIN_ALLOW_THREADS bytes = billm_copied_bytes(d);
    Py_END_ALLOW_THREADS return PyLong_FromSize_t(bytes);
}

static PyMethodDef decoder_methods[] = {
    {"run", (PyCFunction)(void (*)(void))decoder_run, METH_FASTCALL,
     "run(x, starts, cos or None, sin or None, first, caches, logits or None): run layers on x [tokens, hidden] in place"},
    {"copied_bytes", decoder_copied_bytes, METH_NOARGS, "copied_bytes(): of planes that were put into another order"},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot decoder_slots[] = {
    {Py_tp_new, (void *)decoder_new},
    {Py_tp_dealloc, (void *)decoder_dealloc},
    {Py_tp_methods, decoder_methods},
    {0, NULL},
};

static PyType_Spec decoder_spec = {
    .name = "billm_rt.cpu._native.Decoder",
    .basicsize = sizeof(struct decoder),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = decoder_slots,
};

int billm_add_decoder(PyObject *module) {
    PyObject *type = PyType_FromSpec(&decoder_spec);
    int failed = !type || PyModule_AddObjectRef(module, "Decoder", type);
    Py_XDECREF(type);
    return failed ? -1 : 0;
}
