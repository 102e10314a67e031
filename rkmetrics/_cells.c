/* The fast cells: what rkmetrics/_cells_py.py explains, without the interpreter in the way.

Rules that keep this file safe:
  - Nothing here takes a lock, and between reading a cell's memory and writing it no Python code can run: arguments are
    converted to C doubles first. So a finaliser, a signal handler or another thread never finds a half-made update.
  - A cell points into the memory of a Block, and owns a reference to it: releasing an actor name in the registry never leaves
    a cell without memory, it only takes the block out of what is exposed.
  - Cells are not tracked by the garbage collector, which halves what a series costs. They refer to Blocks and Bounds only; so
    what a Block's `offer` reaches must not lead back to a cell of that Block (memory.py sees to it), or both stay for ever. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <float.h>
#include <math.h>
#include <structmember.h>
#include <time.h>

#include "_atomics.h"

/* model.NATIVE_*: schema 3, indexes -159 to 160. */
#define NATIVE_MIN_INDEX (-159)
#define NATIVE_MAX_INDEX 160
#define NATIVE_BUCKETS (NATIVE_MAX_INDEX - NATIVE_MIN_INDEX + 1)
#define NATIVE_ZERO_THRESHOLD (1.0 / 1048576.0)

/* A peak's region: the seconds of a slot, then PEAK_SLOTS pairs of (slot number, highest value). Eight past slots and the
   current one cover the window whatever the moment. */
#define PEAK_SLOTS 9
#define PEAK_REGION (1 + 2 * PEAK_SLOTS)

typedef struct {
    PyTypeObject *block, *bounds, *counter, *gauge, *share, *histogram;
    PyObject *timer; /* time_with() */
} module_state;

static struct PyModuleDef cells_module;

/* Sections that the GIL makes whole, or a lock of the object where there is no GIL. */
#if defined(Py_GIL_DISABLED)
#define ENTER(object) Py_BEGIN_CRITICAL_SECTION(object);
#define LEAVE() Py_END_CRITICAL_SECTION();
#else
#define ENTER(object) {
#define LEAVE() }
#endif

/* ---- Block: memory that cells live in ------------------------------------------------------------------------------- */

typedef struct {
    PyObject_HEAD
    Py_buffer view;
    double *values;
    Py_ssize_t size; /* in doubles */
    PyObject *offer; /* called with (offset, value, labels) for an exemplar; NULL: exemplars are dropped */
    char exported;
} Block;

static int block_init(Block *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"buffer", "offer", NULL};
    PyObject *buffer, *offer = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|O:Block", names, &buffer, &offer))
        return -1;
    if (self->exported) {
        PyErr_SetString(PyExc_TypeError, "a Block is made once");
        return -1;
    }
    if (PyObject_GetBuffer(buffer, &self->view, PyBUF_WRITABLE) < 0)
        return -1;
    self->exported = 1;
    /* An empty buffer may point anywhere; a set of nothing but registered labels has one. */
    if ((self->view.len && (uintptr_t)self->view.buf % sizeof(double)) || self->view.len % (Py_ssize_t)sizeof(double)) {
        PyErr_SetString(PyExc_ValueError, "a Block's buffer is aligned to 8 bytes and a multiple of 8 long");
        return -1;
    }
    static double nothing;
    self->values = self->view.len ? self->view.buf : &nothing; /* never NULL, which means an error */
    self->size = self->view.len / (Py_ssize_t)sizeof(double);
    if (offer && offer != Py_None)
        self->offer = Py_NewRef(offer);
    return 0;
}

static int block_traverse(Block *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->offer);
    Py_VISIT(self->view.obj);
    return 0;
}

static int block_clear(Block *self)
{
    /* Only `offer` can be part of a cycle that matters; the buffer stays while cells may still write into it. */
    Py_CLEAR(self->offer);
    return 0;
}

static void block_dealloc(Block *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    Py_CLEAR(self->offer);
    if (self->exported)
        PyBuffer_Release(&self->view);
    type->tp_free((PyObject *)self);
    Py_DECREF(type);
}

static Py_ssize_t block_length(Block *self) { return self->size; }

static PyObject *block_item(Block *self, Py_ssize_t i)
{
    if (i < 0 || i >= self->size) {
        PyErr_SetString(PyExc_IndexError, "no such number in the block");
        return NULL;
    }
    return PyFloat_FromDouble(rk_get(self->values + i));
}

static PyType_Slot block_slots[] = {
    {Py_tp_doc, "Block(buffer, offer=None)\n\nMemory for cells: a writable buffer of float64, kept exported while the block lives."},
    {Py_tp_init, block_init},
    {Py_tp_new, PyType_GenericNew},
    {Py_tp_traverse, block_traverse},
    {Py_tp_clear, block_clear},
    {Py_tp_dealloc, block_dealloc},
    {Py_sq_length, block_length},
    {Py_sq_item, block_item},
    {0, NULL},
};
static PyType_Spec block_spec = {
    .name = "rkmetrics._cells.Block",
    .basicsize = sizeof(Block),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = block_slots,
};

/* Returns the memory of `width` numbers at `offset`, or NULL with IndexError. */
static double *block_at(Block *block, Py_ssize_t offset, Py_ssize_t width)
{
    if (!block->exported || offset < 0 || width < 0 || offset > block->size - width) {
        PyErr_Format(PyExc_IndexError, "%zd numbers at %zd are outside a block of %zd", width, offset, block->size);
        return NULL;
    }
    return block->values + offset;
}

/* Hands an exemplar on. The observation is counted already, so a failing offer is reported only; but what a signal handler
   raised meanwhile (KeyboardInterrupt, SystemExit) is not ours to keep: -1. */
static int block_offer(Block *block, const double *at, double value, PyObject *labels)
{
    if (!block->offer || labels == Py_None)
        return 0;
    int kept = 0;
    PyObject *offer = Py_NewRef(block->offer);
    PyObject *answer = PyObject_CallFunction(offer, "ndO", (Py_ssize_t)(at - block->values), value, labels);
    if (answer)
        Py_DECREF(answer);
    else if (PyErr_ExceptionMatches(PyExc_Exception))
        PyErr_WriteUnraisable(offer);
    else
        kept = -1;
    Py_DECREF(offer);
    return kept;
}

/* ---- arguments ------------------------------------------------------------------------------------------------------ */

static int as_double(PyObject *number, double *value)
{
    if (PyFloat_CheckExact(number)) {
        *value = PyFloat_AS_DOUBLE(number);
        return 0;
    }
    *value = PyFloat_AsDouble(number); /* may run Python code, before any memory is read */
    return *value == -1.0 && PyErr_Occurred() ? -1 : 0;
}

/* Parses f(number=..., *, exemplar=None). `name` is the number's keyword. Returns -1 with an error, else 0. */
static int parse(PyObject *const *args, Py_ssize_t count, PyObject *keywords, const char *function, const char *name,
                 int required, double *number, PyObject **exemplar)
{
    PyObject *given = count > 0 ? args[0] : NULL;
    if (count > 1) {
        PyErr_Format(PyExc_TypeError, "%s() takes one positional argument, %zd were given", function, count);
        return -1;
    }
    Py_ssize_t named = keywords ? PyTuple_GET_SIZE(keywords) : 0;
    for (Py_ssize_t i = 0; i < named; i++) {
        PyObject *keyword = PyTuple_GET_ITEM(keywords, i);
        if (exemplar && PyUnicode_CompareWithASCIIString(keyword, "exemplar") == 0)
            *exemplar = args[count + i];
        else if (!given && PyUnicode_CompareWithASCIIString(keyword, name) == 0)
            given = args[count + i];
        else {
            PyErr_Format(PyExc_TypeError, "%s() has no argument %R", function, keyword);
            return -1;
        }
    }
    if (!given) {
        if (!required)
            return 0;
        PyErr_Format(PyExc_TypeError, "%s() needs a number", function);
        return -1;
    }
    return as_double(given, number);
}

static PyObject *refuse(const char *what, double value, const char *expected)
{
    PyObject *number = PyFloat_FromDouble(value);
    if (number) {
        PyErr_Format(PyExc_ValueError, "%s(%R): expected %s; nothing was counted", what, number, expected);
        Py_DECREF(number);
    }
    return NULL;
}

/* What all cells begin with. */
#define CELL_HEAD      \
    PyObject_HEAD      \
    Block *block;      \
    double *values;

typedef struct {
    CELL_HEAD
} Cell;

static void cell_dealloc(Cell *self)
{
    PyTypeObject *type = Py_TYPE(self);
    Py_XDECREF(self->block);
    type->tp_free((PyObject *)self);
    Py_DECREF(type);
}

/* The state of the module that made `type` or one of its bases: users may subclass a cell. */
static module_state *state_of(PyTypeObject *type)
{
    PyObject *module = PyType_GetModuleByDef(type, &cells_module);
    return module ? PyModule_GetState(module) : NULL;
}

/* ---- Counter -------------------------------------------------------------------------------------------------------- */

static PyObject *counter_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"block", "offset", NULL};
    module_state *state = state_of(type);
    Block *block;
    Py_ssize_t offset;
    if (!state || !PyArg_ParseTupleAndKeywords(args, kwargs, "O!n:Counter", names, state->block, &block, &offset))
        return NULL;
    double *values = block_at(block, offset, 1);
    if (!values)
        return NULL;
    Cell *self = (Cell *)type->tp_alloc(type, 0);
    if (!self)
        return NULL;
    self->block = (Block *)Py_NewRef(block);
    self->values = values;
    ENTER(block)
    if (rk_is_unset(values))
        rk_set(values, 0.0);
    LEAVE()
    return (PyObject *)self;
}

static PyObject *counter_inc(Cell *self, PyObject *const *args, Py_ssize_t count, PyObject *keywords)
{
    double amount = 1.0, before;
    PyObject *exemplar = Py_None;
    if ((count || keywords) && parse(args, count, keywords, "inc", "amount", 0, &amount, &exemplar) < 0)
        return NULL;
    if (!(amount >= 0.0 && amount <= DBL_MAX))
        return refuse("inc", amount, "a finite amount of 0 or more (counters only rise)");
    rk_add(self->values, amount, &before);
    if (exemplar != Py_None && block_offer(self->block, self->values, amount, exemplar) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *cell_value(Cell *self, void *closure)
{
    (void)closure;
    if (rk_is_unset(self->values))
        Py_RETURN_NONE;
    return PyFloat_FromDouble(rk_get(self->values));
}

static PyMethodDef counter_methods[] = {
    {"inc", (PyCFunction)(void (*)(void))counter_inc, METH_FASTCALL | METH_KEYWORDS,
     "inc($self, amount=1.0, *, exemplar=None)\n--\n\nAdd a finite amount of 0 or more."},
    {NULL, NULL, 0, NULL},
};
static PyGetSetDef counter_getset[] = {
    {"value", (getter)cell_value, NULL, "What was counted so far.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};
static PyType_Slot counter_slots[] = {
    {Py_tp_doc, "A number that only rises."},
    {Py_tp_new, counter_new},
    {Py_tp_dealloc, cell_dealloc},
    {Py_tp_methods, counter_methods},
    {Py_tp_getset, counter_getset},
    {0, NULL},
};
static PyType_Spec counter_spec = {
    .name = "rkmetrics._cells.Counter",
    .basicsize = sizeof(Cell),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = counter_slots,
};

/* ---- Gauge ---------------------------------------------------------------------------------------------------------- */

typedef struct {
    CELL_HEAD
    double *peak; /* a region of PEAK_REGION numbers, or NULL */
} Gauge;

static double monotonic_seconds(void)
{
    struct timespec now;
#ifdef CLOCK_MONOTONIC
    clock_gettime(CLOCK_MONOTONIC, &now);
#else
    timespec_get(&now, TIME_UTC);
#endif
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

/* The number of the slot that `now` lies in, or -1 where the region does not say how long a slot is (spoiled memory). */
static double peak_slot(const double *region, double now)
{
    double seconds = rk_get(region), slot = floor(now / seconds);
    return seconds > 0 && isfinite(seconds) && slot >= 0 && slot < 9e15 ? slot : -1;
}

static void peak_note(double *region, double value)
{
    double slot = peak_slot(region, monotonic_seconds());
    if (slot < 0 || value != value)
        return;
    double *pair = region + 1 + 2 * (Py_ssize_t)fmod(slot, PEAK_SLOTS);
    if (rk_get(pair) != slot) {
        rk_set(pair + 1, value);
        rk_set(pair, slot);
    }
    else
        rk_raise_to(pair + 1, value);
}

static double peak_read(const double *region, double now, double current)
{
    double slot = peak_slot(region, now), highest = current;
    for (int i = 0; slot >= 0 && i < PEAK_SLOTS; i++) {
        double number = rk_get(region + 1 + 2 * i), value = rk_get(region + 2 + 2 * i);
        if (number >= 0 && number > slot - PEAK_SLOTS && !(highest >= value))
            highest = value;
    }
    return highest;
}

static void gauge_add(Gauge *self, double amount)
{
    double before, after = rk_add(self->values, amount, &before);
    if (after != after)
        rk_set(self->values, NAN); /* one spelling of NaN, never the mark of an unset gauge */
    if (self->peak) {
        ENTER(self->block)
        peak_note(self->peak, after > before ? after : before);
        LEAVE()
    }
}

static void gauge_put(Gauge *self, double value)
{
    if (self->peak) {
        double before = rk_is_unset(self->values) ? value : rk_get(self->values);
        ENTER(self->block)
        peak_note(self->peak, before > value ? before : value);
        LEAVE()
    }
    rk_set(self->values, value == value ? value : NAN);
}

static PyObject *gauge_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"block", "offset", "peak", NULL};
    module_state *state = state_of(type);
    Block *block;
    Py_ssize_t offset, peak = -1;
    if (!state || !PyArg_ParseTupleAndKeywords(args, kwargs, "O!n|n:Gauge", names, state->block, &block, &offset, &peak))
        return NULL;
    double *values = block_at(block, offset, 1);
    double *region = values && peak >= 0 ? block_at(block, peak, PEAK_REGION) : NULL;
    if (!values || (peak >= 0 && !region))
        return NULL;
    if (region && !(rk_get(region) > 0)) {
        PyErr_SetString(PyExc_ValueError, "a peak's region starts with the seconds of a slot, more than 0");
        return NULL;
    }
    Gauge *self = (Gauge *)type->tp_alloc(type, 0);
    if (!self)
        return NULL;
    self->block = (Block *)Py_NewRef(block);
    self->values = values;
    self->peak = region;
    return (PyObject *)self;
}

static PyObject *gauge_set(Gauge *self, PyObject *number)
{
    double value;
    if (as_double(number, &value) < 0)
        return NULL;
    gauge_put(self, value);
    Py_RETURN_NONE;
}

static PyObject *gauge_change(Gauge *self, PyObject *const *args, Py_ssize_t count, PyObject *keywords, const char *name,
                              double sign)
{
    double amount = 1.0;
    if ((count || keywords) && parse(args, count, keywords, name, "amount", 0, &amount, NULL) < 0)
        return NULL;
    gauge_add(self, sign * amount);
    Py_RETURN_NONE;
}

static PyObject *gauge_inc(Gauge *self, PyObject *const *args, Py_ssize_t count, PyObject *keywords)
{
    return gauge_change(self, args, count, keywords, "inc", 1.0);
}

static PyObject *gauge_dec(Gauge *self, PyObject *const *args, Py_ssize_t count, PyObject *keywords)
{
    return gauge_change(self, args, count, keywords, "dec", -1.0);
}

static PyObject *gauge_clear(Gauge *self, PyObject *unused)
{
    (void)unused;
    RK_STORE(self->values, RK_UNSET_BITS);
    Py_RETURN_NONE;
}

static PyObject *gauge_share(Gauge *self, PyObject *unused);

static PyMethodDef gauge_methods[] = {
    {"set", (PyCFunction)gauge_set, METH_O, "set($self, value, /)\n--\n\nReplace the value; NaN and infinities are values."},
    {"inc", (PyCFunction)(void (*)(void))gauge_inc, METH_FASTCALL | METH_KEYWORDS,
     "inc($self, amount=1.0)\n--\n\nAdd to the value; an unset gauge counts as 0."},
    {"dec", (PyCFunction)(void (*)(void))gauge_dec, METH_FASTCALL | METH_KEYWORDS,
     "dec($self, amount=1.0)\n--\n\nSubtract from the value; an unset gauge counts as 0."},
    {"clear", (PyCFunction)gauge_clear, METH_NOARGS, "clear($self, /)\n--\n\nTake the series away until the next update."},
    {"share", (PyCFunction)gauge_share, METH_NOARGS,
     "share($self, /)\n--\n\nOne instance's part of the value, withdrawn when it is closed or collected."},
    {NULL, NULL, 0, NULL},
};
static PyGetSetDef gauge_getset[] = {
    {"value", (getter)cell_value, NULL, "The value, or None while the gauge is unset.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};
static PyType_Slot gauge_slots[] = {
    {Py_tp_doc, "A number that goes up and down, or is unset."},
    {Py_tp_new, gauge_new},
    {Py_tp_dealloc, cell_dealloc},
    {Py_tp_methods, gauge_methods},
    {Py_tp_getset, gauge_getset},
    {0, NULL},
};
static PyType_Spec gauge_spec = {
    .name = "rkmetrics._cells.Gauge",
    .basicsize = sizeof(Gauge),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = gauge_slots,
};

/* ---- GaugeShare ----------------------------------------------------------------------------------------------------- */

typedef struct {
    PyObject_HEAD
    Gauge *gauge;
    double part;
    char closed;
} Share;

static PyObject *share_of(PyTypeObject *type, Gauge *gauge)
{
    Share *self = (Share *)type->tp_alloc(type, 0);
    if (self)
        self->gauge = (Gauge *)Py_NewRef(gauge);
    return (PyObject *)self;
}

static PyObject *gauge_share(Gauge *self, PyObject *unused)
{
    (void)unused;
    module_state *state = state_of(Py_TYPE(self));
    return state ? share_of(state->share, self) : NULL;
}

static PyObject *share_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"gauge", NULL};
    module_state *state = state_of(type);
    Gauge *gauge;
    if (!state || !PyArg_ParseTupleAndKeywords(args, kwargs, "O!:GaugeShare", names, state->gauge, &gauge))
        return NULL;
    return share_of(type, gauge);
}

static void share_move(Share *self, double part)
{
    double change = part - self->part;
    self->part = part;
    gauge_add(self->gauge, change);
}

static void share_dealloc(Share *self)
{
    PyTypeObject *type = Py_TYPE(self);
    if (self->gauge && !self->closed && self->part != 0.0)
        share_move(self, 0.0);
    Py_XDECREF(self->gauge);
    type->tp_free((PyObject *)self);
    Py_DECREF(type);
}

static PyObject *share_change(Share *self, double value, int relative)
{
    if (!isfinite(value))
        return refuse(relative ? "inc" : "set", value, "a finite number (an infinite part could never be withdrawn)");
    ENTER(self)
    if (!self->closed)
        share_move(self, relative ? self->part + value : value);
    LEAVE()
    Py_RETURN_NONE;
}

static PyObject *share_set(Share *self, PyObject *number)
{
    double value;
    return as_double(number, &value) < 0 ? NULL : share_change(self, value, 0);
}

static PyObject *share_inc(Share *self, PyObject *const *args, Py_ssize_t count, PyObject *keywords)
{
    double amount = 1.0;
    if ((count || keywords) && parse(args, count, keywords, "inc", "amount", 0, &amount, NULL) < 0)
        return NULL;
    return share_change(self, amount, 1);
}

static PyObject *share_dec(Share *self, PyObject *const *args, Py_ssize_t count, PyObject *keywords)
{
    double amount = 1.0;
    if ((count || keywords) && parse(args, count, keywords, "dec", "amount", 0, &amount, NULL) < 0)
        return NULL;
    return share_change(self, -amount, 1);
}

static PyObject *share_close(Share *self, PyObject *unused)
{
    (void)unused;
    int first = 0;
    ENTER(self)
    if (!self->closed) {
        if (self->part != 0.0)
            share_move(self, 0.0);
        self->closed = 1;
        first = 1;
    }
    LEAVE()
    return PyBool_FromLong(first);
}

static PyObject *share_value(Share *self, void *closure)
{
    (void)closure;
    return PyFloat_FromDouble(self->part);
}

static PyObject *share_closed(Share *self, void *closure)
{
    (void)closure;
    return PyBool_FromLong(self->closed);
}

static PyMethodDef share_methods[] = {
    {"set", (PyCFunction)share_set, METH_O, "set($self, value, /)\n--\n\nMake this instance's part a finite value."},
    {"inc", (PyCFunction)(void (*)(void))share_inc, METH_FASTCALL | METH_KEYWORDS,
     "inc($self, amount=1.0)\n--\n\nAdd to this instance's part."},
    {"dec", (PyCFunction)(void (*)(void))share_dec, METH_FASTCALL | METH_KEYWORDS,
     "dec($self, amount=1.0)\n--\n\nSubtract from this instance's part."},
    {"close", (PyCFunction)share_close, METH_NOARGS,
     "close($self, /)\n--\n\nWithdraw the part for good; True the first time, and every later update is ignored."},
    {NULL, NULL, 0, NULL},
};
static PyGetSetDef share_getset[] = {
    {"value", (getter)share_value, NULL, "This instance's part.", NULL},
    {"closed", (getter)share_closed, NULL, "Whether the part was withdrawn for good.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};
static PyType_Slot share_slots[] = {
    {Py_tp_doc, "GaugeShare(gauge)\n\nOne instance's part of a gauge; withdrawn when closed or collected."},
    {Py_tp_new, share_new},
    {Py_tp_dealloc, share_dealloc},
    {Py_tp_methods, share_methods},
    {Py_tp_getset, share_getset},
    {0, NULL},
};
static PyType_Spec share_spec = {
    .name = "rkmetrics._cells.GaugeShare",
    .basicsize = sizeof(Share),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = share_slots,
};

/* ---- Bounds and Histogram ------------------------------------------------------------------------------------------- */

/* Followed by infinities, which no value is above, up to step * step - 1 in all: what bucket_of() looks at. */
typedef struct {
    PyObject_VAR_HEAD
    Py_ssize_t count, step;
    char native;
    double bounds[1];
} Bounds;

static PyObject *bounds_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"bounds", "native", NULL};
    PyObject *given;
    int native = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!|p:Bounds", names, &PyTuple_Type, &given, &native))
        return NULL;
    Py_ssize_t n = PyTuple_GET_SIZE(given), step = 1;
    while (step * step <= n)
        step++;
    Bounds *self = (Bounds *)type->tp_alloc(type, step * step - 1);
    if (!self)
        return NULL;
    self->count = n;
    self->step = step;
    for (Py_ssize_t i = n; i < step * step - 1; i++)
        self->bounds[i] = INFINITY;
    self->native = (char)native;
    for (Py_ssize_t i = 0; i < n; i++) {
        if (as_double(PyTuple_GET_ITEM(given, i), &self->bounds[i]) < 0)
            goto fail;
        if (!isfinite(self->bounds[i]) || (i && !(self->bounds[i] > self->bounds[i - 1]))) {
            PyErr_SetString(PyExc_ValueError, "bucket bounds are finite and increase strictly");
            goto fail;
        }
    }
    return (PyObject *)self;
fail:
    Py_DECREF(self);
    return NULL;
}

static void bounds_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    type->tp_free(self);
    Py_DECREF(type);
}

static Py_ssize_t bounds_length(Bounds *self) { return self->count; }

static PyObject *bounds_width(Bounds *self, void *closure)
{
    (void)closure;
    return PyLong_FromSsize_t(self->count + 2 + (self->native ? 1 + NATIVE_BUCKETS : 0));
}

static PyGetSetDef bounds_getset[] = {
    {"width", (getter)bounds_width, NULL, "Numbers that a histogram with these bounds takes.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};
static PyType_Slot bounds_slots[] = {
    {Py_tp_doc, "Bounds(bounds, native=False)\n\nUpper bounds of buckets without +Inf; one object serves all series of a histogram."},
    {Py_tp_new, bounds_new},
    {Py_tp_dealloc, bounds_dealloc},
    {Py_tp_getset, bounds_getset},
    {Py_sq_length, bounds_length},
    {0, NULL},
};
static PyType_Spec bounds_spec = {
    .name = "rkmetrics._cells.Bounds",
    .basicsize = offsetof(Bounds, bounds),
    .itemsize = sizeof(double),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = bounds_slots,
};

typedef struct {
    CELL_HEAD
    Bounds *bounds;
} Histogram;

static PyObject *histogram_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"block", "offset", "bounds", NULL};
    module_state *state = state_of(type);
    Block *block;
    Bounds *bounds;
    Py_ssize_t offset;
    if (!state || !PyArg_ParseTupleAndKeywords(args, kwargs, "O!nO!:Histogram", names, state->block, &block, &offset,
                                               state->bounds, &bounds))
        return NULL;
    Py_ssize_t width = bounds->count + 2 + (bounds->native ? 1 + NATIVE_BUCKETS : 0);
    double *values = block_at(block, offset, width);
    if (!values)
        return NULL;
    Histogram *self = (Histogram *)type->tp_alloc(type, 0);
    if (!self)
        return NULL;
    self->block = (Block *)Py_NewRef(block);
    self->bounds = (Bounds *)Py_NewRef(bounds);
    self->values = values;
    ENTER(block)
    if (rk_is_unset(values)) {
        for (Py_ssize_t i = width - 1; i >= 0; i--) /* the first number last: it says whether the series exists */
            rk_set(values + i, 0.0);
    }
    LEAVE()
    return (PyObject *)self;
}

static void histogram_dealloc(Histogram *self)
{
    Py_XDECREF(self->bounds);
    cell_dealloc((Cell *)self);
}

/* The native bucket of a value above the zero threshold: its power of two, then one of eight steps (2**(k/8), half of it
   since frexp's fraction lies in [0.5, 1)). Buckets include their upper bound, hence <=. */
static Py_ssize_t native_bucket(double value)
{
    static const double steps[8] = {0.5, 0.5452538663326288, 0.5946035575013605, 0.6484197773255048,
                                    0.7071067811865476, 0.7711054127039704, 0.8408964152537146, 0.9170040432046712};
    int exponent, step = 0;
    double fraction = frexp(value, &exponent);
    while (step < 8 && fraction > steps[step])
        step++;
    Py_ssize_t index = (Py_ssize_t)(exponent - 1) * 8 + step;
    if (index > NATIVE_MAX_INDEX)
        index = NATIVE_MAX_INDEX;
    return index - NATIVE_MIN_INDEX;
}

/* How many bounds lie below value: first whole steps, then within one. No branch depends on the value; a binary search would
   mispredict about half of its steps, and lose more each time than all these comparisons take. */
static inline Py_ssize_t stepwise(const double *upper, Py_ssize_t step, double value)
{
    Py_ssize_t low = 0;
    for (Py_ssize_t i = 1; i < step; i++)
        low += value > upper[i * step - 1];
    low *= step;
    upper += low;
    for (Py_ssize_t i = 0; i < step - 1; i++)
        low += value > upper[i];
    return low;
}

static inline Py_ssize_t bucket_of(const Bounds *bounds, double value)
{
    /* A constant step, that of the usual fifteen bounds, is written out without loops. */
    return bounds->step == 4 ? stepwise(bounds->bounds, 4, value) : stepwise(bounds->bounds, bounds->step, value);
}

static PyObject *histogram_observe(Histogram *self, PyObject *const *args, Py_ssize_t count, PyObject *keywords)
{
    double value, ignored;
    PyObject *exemplar = Py_None;
    if (count == 1 && !keywords) {
        if (as_double(args[0], &value) < 0)
            return NULL;
    }
    else if (parse(args, count, keywords, "observe", "value", 1, &value, &exemplar) < 0)
        return NULL;
    const Bounds *bounds = self->bounds;
    Py_ssize_t n = bounds->count;
    if (!isfinite(value) || (value < 0.0 && !(n && bounds->bounds[0] < 0.0)))
        return refuse("observe", value,
                      isfinite(value) ? "0 or more, as the lowest bucket bound is (the sum is a counter)" : "a finite number");
    Py_ssize_t low = bucket_of(bounds, value);
    double *values = self->values;
    rk_add(values + n + 1, value, &ignored);
    rk_add(values + low, 1.0, &ignored);
    if (bounds->native) {
        double *native = values + n + 2;
        if (value > NATIVE_ZERO_THRESHOLD)
            rk_add(native + 1 + native_bucket(value), 1.0, &ignored);
        else
            rk_add(native, 1.0, &ignored);
    }
    if (exemplar != Py_None && block_offer(self->block, values + low, value, exemplar) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *histogram_counts(Histogram *self, void *closure)
{
    (void)closure;
    Py_ssize_t n = self->bounds->count + 1;
    PyObject *counts = PyTuple_New(n);
    for (Py_ssize_t i = 0; counts && i < n; i++) {
        PyObject *number = PyLong_FromDouble(rk_get(self->values + i));
        if (!number) {
            Py_DECREF(counts);
            return NULL;
        }
        PyTuple_SET_ITEM(counts, i, number);
    }
    return counts;
}

static PyObject *histogram_count(Histogram *self, void *closure)
{
    (void)closure;
    double total = 0;
    for (Py_ssize_t i = 0; i <= self->bounds->count; i++)
        total += rk_get(self->values + i);
    return PyLong_FromDouble(total);
}

static PyObject *histogram_sum(Histogram *self, void *closure)
{
    (void)closure;
    return PyFloat_FromDouble(rk_get(self->values + self->bounds->count + 1));
}

static PyObject *histogram_time(Histogram *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"exemplar", NULL};
    PyObject *exemplar = Py_None;
    module_state *state = state_of(Py_TYPE(self));
    if (!state || !PyArg_ParseTupleAndKeywords(args, kwargs, "|$O:time", names, &exemplar))
        return NULL;
    if (!state->timer) {
        PyErr_SetString(PyExc_RuntimeError, "time() before time_with()");
        return NULL;
    }
    return PyObject_CallFunctionObjArgs(state->timer, self, exemplar, NULL);
}

static PyMethodDef histogram_methods[] = {
    {"observe", (PyCFunction)(void (*)(void))histogram_observe, METH_FASTCALL | METH_KEYWORDS,
     "observe($self, value, *, exemplar=None)\n--\n\nCount one observation, in the base unit of the metric's name."},
    {"time", (PyCFunction)(void (*)(void))histogram_time, METH_VARARGS | METH_KEYWORDS,
     "time($self, *, exemplar=None)\n--\n\n"
     "A timer that observes the seconds a block, or each call of a function, takes; also when it raises.\n\n"
     "`with cell.time(): ...`, `async with cell.time(): ...`, `@cell.time()` on functions and coroutine functions."},
    {NULL, NULL, 0, NULL},
};
static PyGetSetDef histogram_getset[] = {
    {"counts", (getter)histogram_counts, NULL, "Observations in each bucket, not cumulative, the last above all bounds.", NULL},
    {"count", (getter)histogram_count, NULL, "How many observations there were.", NULL},
    {"sum", (getter)histogram_sum, NULL, "The sum of all observations.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};
static PyType_Slot histogram_slots[] = {
    {Py_tp_doc, "Counts of observations in buckets, and their sum."},
    {Py_tp_new, histogram_new},
    {Py_tp_dealloc, histogram_dealloc},
    {Py_tp_methods, histogram_methods},
    {Py_tp_getset, histogram_getset},
    {0, NULL},
};
static PyType_Spec histogram_spec = {
    .name = "rkmetrics._cells.Histogram",
    .basicsize = sizeof(Histogram),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = histogram_slots,
};

/* ---- snapshots ------------------------------------------------------------------------------------------------------ */

/* gather(blocks, offset, count): for each block its numbers [offset, offset + count), one after another, as bytes. */
static PyObject *gather(PyObject *module, PyObject *args)
{
    module_state *state = PyModule_GetState(module);
    PyObject *given;
    Py_ssize_t offset, count;
    if (!PyArg_ParseTuple(args, "Onn:gather", &given, &offset, &count))
        return NULL;
    PyObject *blocks = PySequence_Tuple(given); /* ours alone: nobody changes it meanwhile */
    if (!blocks)
        return NULL;
    Py_ssize_t n = PyTuple_GET_SIZE(blocks);
    PyObject *bytes = NULL;
    if (offset < 0 || count < 0 || (n && count > PY_SSIZE_T_MAX / (Py_ssize_t)sizeof(double) / n)) {
        PyErr_SetString(PyExc_ValueError, "gather() takes an offset and a count of 0 or more");
        goto done;
    }
    bytes = PyBytes_FromStringAndSize(NULL, n * count * (Py_ssize_t)sizeof(double));
    char *out = bytes ? PyBytes_AS_STRING(bytes) : NULL;
    for (Py_ssize_t i = 0; bytes && i < n; i++) {
        Block *block = (Block *)PyTuple_GET_ITEM(blocks, i);
        const double *from = NULL;
        if (!Py_IS_TYPE(block, state->block))
            PyErr_SetString(PyExc_TypeError, "gather() takes Blocks");
        else
            from = block_at(block, offset, count);
        if (!from) {
            Py_CLEAR(bytes);
            break;
        }
        for (Py_ssize_t k = 0; k < count; k++, out += sizeof(double)) {
            uint64_t bits = RK_LOAD(from + k);
            memcpy(out, &bits, sizeof bits);
        }
    }
done:
    Py_DECREF(blocks);
    return bytes;
}

/* existing(blocks, offset, count, width): how many series of a column exist, over all blocks. */
static PyObject *existing(PyObject *module, PyObject *args)
{
    module_state *state = PyModule_GetState(module);
    PyObject *given;
    Py_ssize_t offset, count, width, found = 0;
    if (!PyArg_ParseTuple(args, "Onnn:existing", &given, &offset, &count, &width))
        return NULL;
    if (offset < 0 || count < 0 || width < 1) {
        PyErr_SetString(PyExc_ValueError, "existing() takes an offset and a count of 0 or more, and a width of 1 or more");
        return NULL;
    }
    PyObject *blocks = PySequence_Tuple(given);
    if (!blocks)
        return NULL;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(blocks); i++) {
        Block *block = (Block *)PyTuple_GET_ITEM(blocks, i);
        const double *from = NULL;
        if (!Py_IS_TYPE(block, state->block))
            PyErr_SetString(PyExc_TypeError, "existing() takes Blocks");
        else
            from = block_at(block, offset, count);
        if (!from) {
            Py_DECREF(blocks);
            return NULL;
        }
        for (Py_ssize_t k = 0; k < count; k += width)
            found += !rk_is_unset(from + k);
    }
    Py_DECREF(blocks);
    return PyLong_FromSsize_t(found);
}

/* peaks(blocks, gauge, peak, now): for each block the highest recent value of its gauge; unset while the gauge is and was. */
static PyObject *peaks(PyObject *module, PyObject *args)
{
    module_state *state = PyModule_GetState(module);
    PyObject *given;
    Py_ssize_t gauge, peak;
    double now;
    if (!PyArg_ParseTuple(args, "Onnd:peaks", &given, &gauge, &peak, &now))
        return NULL;
    PyObject *blocks = PySequence_Tuple(given);
    if (!blocks)
        return NULL;
    Py_ssize_t n = PyTuple_GET_SIZE(blocks);
    PyObject *bytes = PyBytes_FromStringAndSize(NULL, n * (Py_ssize_t)sizeof(double));
    for (Py_ssize_t i = 0; bytes && i < n; i++) {
        Block *block = (Block *)PyTuple_GET_ITEM(blocks, i);
        const double *value = NULL, *region = NULL;
        if (!Py_IS_TYPE(block, state->block))
            PyErr_SetString(PyExc_TypeError, "peaks() takes Blocks");
        else if ((value = block_at(block, gauge, 1)))
            region = block_at(block, peak, PEAK_REGION);
        if (!region) {
            Py_CLEAR(bytes);
            break;
        }
        double highest = peak_read(region, now, rk_is_unset(value) ? -INFINITY : rk_get(value));
        uint64_t bits = highest == -INFINITY && rk_is_unset(value) ? RK_UNSET_BITS : rk_bits(highest);
        memcpy(PyBytes_AS_STRING(bytes) + i * (Py_ssize_t)sizeof(double), &bits, sizeof bits);
    }
    Py_DECREF(blocks);
    return bytes;
}

/* time_with(timer): what Histogram.time() calls with the cell and the exemplar. */
static PyObject *time_with(PyObject *module, PyObject *timer)
{
    module_state *state = PyModule_GetState(module);
    Py_XSETREF(state->timer, Py_NewRef(timer));
    Py_RETURN_NONE;
}

static PyMethodDef module_methods[] = {
    {"time_with", time_with, METH_O,
     "time_with(timer, /)\n--\n\nName what Histogram.time() makes, called with the cell and the exemplar."},
    {"gather", gather, METH_VARARGS, "gather(blocks, offset, count, /)\n--\n\nThe same numbers of every block, as bytes of float64."},
    {"existing", existing, METH_VARARGS,
     "existing(blocks, offset, count, width, /)\n--\n\nHow many series of a column exist, over all blocks."},
    {"peaks", peaks, METH_VARARGS,
     "peaks(blocks, gauge, peak, now, /)\n--\n\nThe highest recent value of every block's gauge, as bytes of float64."},
    {NULL, NULL, 0, NULL},
};

/* ---- the module ----------------------------------------------------------------------------------------------------- */

static int add_type(PyObject *module, PyType_Spec *spec, PyTypeObject **type)
{
    *type = (PyTypeObject *)PyType_FromModuleAndSpec(module, spec, NULL);
    return *type ? PyModule_AddType(module, *type) : -1;
}

static int module_exec(PyObject *module)
{
    module_state *state = PyModule_GetState(module);
    if (add_type(module, &block_spec, &state->block) < 0 || add_type(module, &bounds_spec, &state->bounds) < 0 ||
        add_type(module, &counter_spec, &state->counter) < 0 || add_type(module, &gauge_spec, &state->gauge) < 0 ||
        add_type(module, &share_spec, &state->share) < 0 || add_type(module, &histogram_spec, &state->histogram) < 0)
        return -1;
    if (PyModule_AddIntConstant(module, "PEAK_SLOTS", PEAK_SLOTS) < 0)
        return -1;
    return PyModule_AddIntConstant(module, "PEAK_REGION", PEAK_REGION);
}

static int module_traverse(PyObject *module, visitproc visit, void *arg)
{
    module_state *state = PyModule_GetState(module);
    Py_VISIT(state->block);
    Py_VISIT(state->bounds);
    Py_VISIT(state->counter);
    Py_VISIT(state->gauge);
    Py_VISIT(state->share);
    Py_VISIT(state->histogram);
    Py_VISIT(state->timer);
    return 0;
}

static int module_clear(PyObject *module)
{
    module_state *state = PyModule_GetState(module);
    Py_CLEAR(state->block);
    Py_CLEAR(state->bounds);
    Py_CLEAR(state->counter);
    Py_CLEAR(state->gauge);
    Py_CLEAR(state->share);
    Py_CLEAR(state->histogram);
    Py_CLEAR(state->timer);
    return 0;
}

static PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, module_exec},
#if PY_VERSION_HEX >= 0x030C0000
    {Py_mod_multiple_interpreters, Py_MOD_PER_INTERPRETER_GIL_SUPPORTED},
#endif
#if PY_VERSION_HEX >= 0x030D0000
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef cells_module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "rkmetrics._cells",
    .m_doc = "The fast cells; rkmetrics/_cells_py.py is their specification.",
    .m_size = sizeof(module_state),
    .m_methods = module_methods,
    .m_slots = module_slots,
    .m_traverse = module_traverse,
    .m_clear = module_clear,
};

PyMODINIT_FUNC PyInit__cells(void) { return PyModuleDef_Init(&cells_module); }
