/* The Python face of the lane; see _lane.pyi. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <string.h>

#include "names.h"
#include "serve.h"

#define ARRAYS 17
#define SMALL (128 << 10) /* answers up to this size are written without letting go of the GIL */

#define ROUNDS 16 /* after which the event loop looks for answers, however busy it is */

typedef struct {
    PyObject_HEAD
    struct lane lane;
    Py_buffer arrays[ARRAYS];
    int array_count;
    bool started;
    bool stopped;
    bool answers_soon; /* pyfuse3 gives one before the event loop waits */
    unsigned rounds;   /* of the loop in which none was expected */
} LaneObject;

static PyObject *raise_errno(int error)
{
    errno = error;
    return PyErr_SetFromErrno(PyExc_OSError);
}

/* One array of the core, which stays where it is as long as we hold it. */
static void *hold(LaneObject *self, PyObject *arrays, const char *name, size_t item, size_t count)
{
    PyObject *array = PyDict_GetItemString(arrays, name);
    if (!array) {
        PyErr_Format(PyExc_KeyError, "%s", name);
        return NULL;
    }
    Py_buffer *buffer = &self->arrays[self->array_count];
    if (PyObject_GetBuffer(array, buffer, PyBUF_WRITABLE | PyBUF_C_CONTIGUOUS) < 0)
        return NULL;
    self->array_count++;
    if (buffer->len < 0 || (size_t)buffer->len != item * count) {
        PyErr_Format(PyExc_ValueError, "%s has %zd bytes, not %zu", name, buffer->len,
                     item * count);
        return NULL;
    }
    return buffer->buf;
}

static bool hold_all(LaneObject *self, PyObject *arrays)
{
    struct core *core = &self->lane.core;
    size_t slots = core->slot_count, tags = (size_t)core->tag_mask + 1;
#define HOLD(field, item, count)                                                                   \
    if (!(core->field = hold(self, arrays, #field, item, count)))                                  \
        return false;
    HOLD(tags, 4, tags)
    HOLD(image, 4, slots)
    HOLD(block, 4, slots)
    HOLD(generation, 4, slots)
    HOLD(valid, 2, slots)
    HOLD(dirty, 2, slots)
    HOLD(cleaning, 2, slots)
    HOLD(unsynced, 2, slots)
    HOLD(pins, 1, slots)
    HOLD(last_used, 8, slots)
    HOLD(gates, sizeof(struct gate), core->gate_count)
    HOLD(clock, 8, 1)
    HOLD(soiled_count, 8, 1)
    HOLD(soiled, 4, core->soiled_room)
    HOLD(syncs, 8, 3)
    HOLD(syncing, 4, core->soiled_room)
    HOLD(syncing_pages, 2, core->soiled_room)
#undef HOLD
    return true;
}

static const char *out_of_range(const struct lane *lane, unsigned tag_bits)
{
    const struct core *core = &lane->core;
    if (tag_bits < 1 || tag_bits > 32 || core->tag_shift != 32 - tag_bits)
        return "tag_bits";
    if (core->block_shift < 12 || core->block_shift > 20)
        return "block_shift";
    if (core->page_shift < 12 || core->page_shift > core->block_shift ||
        core->block_shift - core->page_shift > 4)
        return "page_shift";
    if (core->slot_count < 1 || core->slot_count == UINT32_MAX)
        return "slot_count";
    if (core->gate_count < 1 || core->gate_count > MOST_GATES)
        return "gate_count";
    if (lane->readers < 1 || lane->readers > 64)
        return "readers";
    if (lane->spares > 256)
        return "spares";
    if (lane->queue_count > MOST_QUEUES || lane->queue_threads > MOST_QUEUES)
        return "queues";
    return lane->max_background > 0xFFFF ? "max_background" : NULL;
}

static int begin(LaneObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"arrays",      "slot_count", "gate_count",  "block_shift",
                            "page_shift",  "tag_shift",  "tag_bits",    "soiled_room",
                            "fuse",        "passed",     "device",      "data_offset",
                            "readers",     "spares",     "ring",        "capability",
                            "max_background", "queues", "queue_threads", NULL};
    PyObject *arrays;
    struct lane *lane = &self->lane;
    unsigned tag_bits;
    int ring, capability;
    unsigned long long data_offset;
    if (!PyArg_ParseTupleAndKeywords(
            args, kwargs, "O!IIIIIIIiiiKIIppI|II", names, &PyDict_Type, &arrays,
            &lane->core.slot_count, &lane->core.gate_count, &lane->core.block_shift,
            &lane->core.page_shift, &lane->core.tag_shift, &tag_bits, &lane->core.soiled_room,
            &lane->fuse, &lane->pass, &lane->device, &data_offset, &lane->readers,
            &lane->spares, &ring, &capability, &lane->max_background, &lane->queue_count,
            &lane->queue_threads))
        return -1;
    const char *wrong = out_of_range(lane, tag_bits);
    if (wrong) {
        PyErr_Format(PyExc_ValueError, "%s is out of range", wrong);
        return -1;
    }
    lane->core.tag_mask = (uint32_t)((UINT64_C(1) << tag_bits) - 1);
    lane->data_offset = data_offset;
    lane->ring = ring;
    lane->capability = capability;
    if (!hold_all(self, arrays))
        return -1;
    self->started = true;
    int error = lane_start(lane);
    if (error) {
        raise_errno(error);
        return -1;
    }
    return 0;
}

/* There is no lane that was not started, and none is started twice. */
static PyObject *lane_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    LaneObject *self = (LaneObject *)type->tp_alloc(type, 0);
    if (self && begin(self, args, kwargs) < 0)
        Py_CLEAR(self);
    return (PyObject *)self;
}

static bool stop(LaneObject *self, unsigned milliseconds)
{
    if (!self->stopped) {
        Py_BEGIN_ALLOW_THREADS
        self->stopped = lane_stop(&self->lane, milliseconds);
        Py_END_ALLOW_THREADS
        if (self->stopped) {
            for (int i = 0; i < self->array_count; i++)
                PyBuffer_Release(&self->arrays[i]);
            self->array_count = 0;
        }
    }
    return self->stopped;
}

static void lane_dealloc(LaneObject *self)
{
    /* A thread that hangs in the device may come back: then nothing it uses may go. */
    if (!self->started) {
        for (int i = 0; i < self->array_count; i++)
            PyBuffer_Release(&self->arrays[i]);
    } else if (stop(self, 1000)) {
        lane_free(&self->lane);
    } else {
        lane_abandon(&self->lane);
        return;
    }
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyObject *waiting_tuple(const struct waiting *waiting)
{
    const struct request *request = &waiting->request;
    PyObject *data;
    if (request->data) {
        data = PyBytes_FromStringAndSize(request->data, (Py_ssize_t)request->length);
        if (!data)
            return NULL;
    } else {
        data = Py_NewRef(Py_None);
    }
    bool of_node = request->kind == REQUEST_LOOKUP || request->kind == REQUEST_GETATTR ||
                   request->kind == REQUEST_OPEN;
    uint64_t of = of_node ? request->node : request->handle;
    return Py_BuildValue("(KIKKKIN)", (unsigned long long)request->unique, request->opcode,
                         (unsigned long long)of, (unsigned long long)request->offset,
                         (unsigned long long)request->length, request->detail, data);
}

static PyObject *lane_py_take(LaneObject *self, PyObject *Py_UNUSED(ignored))
{
    PyObject *list = PyList_New(0);
    struct waiting *first = list ? lane_take(&self->lane) : NULL;
    for (struct waiting *waiting = first; waiting && list; waiting = waiting->next) {
        PyObject *tuple = waiting_tuple(waiting);
        if (!tuple || PyList_Append(list, tuple) < 0)
            Py_CLEAR(list); /* no memory: the error is raised, and all of these get EIO */
        Py_XDECREF(tuple);
    }
    for (struct waiting *next, *waiting = first; waiting; waiting = next) {
        next = waiting->next;
        if (!list) {
            lane_reply(&self->lane, waiting->request.unique, EIO, NULL, 0);
            names_drop(&waiting->request);
        }
        lane_done(&self->lane, waiting);
    }
    return list;
}

static PyObject *lane_py_reply(LaneObject *self, PyObject *args)
{
    unsigned long long unique;
    int error, failed;
    Py_buffer data;
    if (!PyArg_ParseTuple(args, "Kiy*", &unique, &error, &data))
        return NULL;
    attributes_told(&self->lane, unique);
    if (data.len <= SMALL) {
        failed = lane_reply(&self->lane, unique, error, data.buf, (size_t)data.len);
    } else {
        Py_BEGIN_ALLOW_THREADS
        failed = lane_reply(&self->lane, unique, error, data.buf, (size_t)data.len);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&data);
    return PyLong_FromLong(failed);
}

static PyObject *lane_py_open(LaneObject *self, PyObject *args)
{
    unsigned long long handle, node;
    unsigned gate;
    int writes;
    if (!PyArg_ParseTuple(args, "KKIp", &handle, &node, &gate, &writes))
        return NULL;
    if (gate >= self->lane.core.gate_count) {
        PyErr_SetString(PyExc_ValueError, "no such gate");
        return NULL;
    }
    table_drop(self->lane.nodes, node);
    table_put(self->lane.nodes, node, gate);
    table_put(self->lane.handles, handle, gate);
    if (!writes)
        table_put(self->lane.readers_only, handle, gate);
    __atomic_store_n(&self->lane.opened[gate], node, __ATOMIC_RELAXED);
    Py_RETURN_NONE;
}

static PyObject *lane_py_close(LaneObject *self, PyObject *args)
{
    unsigned long long handle;
    if (!PyArg_ParseTuple(args, "K", &handle))
        return NULL;
    table_drop(self->lane.handles, handle);
    table_drop(self->lane.readers_only, handle);
    Py_RETURN_NONE;
}

static PyObject *lane_py_open_directory(LaneObject *self, PyObject *args)
{
    unsigned long long node;
    unsigned fd;
    if (!PyArg_ParseTuple(args, "KI", &node, &fd))
        return NULL;
    if (fd < MOST_GATES) /* else it is simply not known here */
        table_put(self->lane.directories, node, fd);
    Py_RETURN_NONE;
}

static PyObject *lane_py_close_directory(LaneObject *self, PyObject *args)
{
    unsigned long long node;
    if (!PyArg_ParseTuple(args, "K", &node))
        return NULL;
    table_drop(self->lane.directories, node);
    Py_RETURN_NONE;
}

static PyObject *lane_py_keep_attributes(LaneObject *self, PyObject *args)
{
    unsigned long long node;
    Py_buffer answer;
    struct told told;
    if (!PyArg_ParseTuple(args, "Kiy*", &node, &told.fd, &answer))
        return NULL;
    bool fits = answer.len == sizeof told.answer;
    if (fits) {
        told.node = node;
        memcpy(&told.answer, answer.buf, sizeof told.answer);
        attributes_keep(&self->lane, &told);
    } else {
        PyErr_SetString(PyExc_ValueError, "no answer to a question for attributes");
    }
    PyBuffer_Release(&answer);
    return fits ? Py_NewRef(Py_None) : NULL;
}

static PyObject *lane_py_drop_attributes(LaneObject *self, PyObject *args)
{
    unsigned long long node;
    if (!PyArg_ParseTuple(args, "K", &node))
        return NULL;
    attributes_drop(&self->lane, node);
    Py_RETURN_NONE;
}

static PyObject *lane_py_invalidate(LaneObject *self, PyObject *args)
{
    unsigned long long node;
    if (!PyArg_ParseTuple(args, "K", &node))
        return NULL;
    struct {
        struct fuse_out_header header;
        struct fuse_notify_inval_inode_out out;
    } message = {.header = {.len = sizeof message, .error = FUSE_NOTIFY_INVAL_INODE},
                 .out = {.ino = node, .off = 0, .len = 0}};
    ssize_t done;
    Py_BEGIN_ALLOW_THREADS
    do
        done = write(self->lane.fuse, &message, sizeof message);
    while (done < 0 && errno == EINTR);
    Py_END_ALLOW_THREADS
    return done < 0 ? PyErr_SetFromErrno(PyExc_OSError) : Py_NewRef(Py_None);
}

/* This and the next two are called in each round of the event loop, by trio itself: see laned.py. */
static PyObject *lane_py_enter(LaneObject *self, PyObject *Py_UNUSED(ignored))
{
    if (!turns_try_enter(&self->lane.turns)) {
        Py_BEGIN_ALLOW_THREADS
        turns_enter(&self->lane.turns);
        Py_END_ALLOW_THREADS
    }
    Py_RETURN_NONE;
}

static PyObject *lane_py_leave(LaneObject *self, PyObject *Py_UNUSED(ignored))
{
    turns_leave(&self->lane.turns);
    Py_RETURN_NONE;
}

static PyObject *lane_py_bring_answers(LaneObject *self, PyObject *args)
{
    double seconds = 1;
    if (!PyArg_ParseTuple(args, "|d", &seconds))
        return NULL;
    if (seconds > 0 || self->answers_soon || ++self->rounds == ROUNDS) {
        self->answers_soon = false;
        self->rounds = 0;
        serve_answers(&self->lane);
    }
    Py_RETURN_NONE;
}

static PyObject *lane_py_make_room(LaneObject *self, PyObject *Py_UNUSED(ignored))
{
    if (__atomic_load_n(&self->lane.unanswered, __ATOMIC_RELAXED) > 1)
        serve_answers(&self->lane);
    self->answers_soon = true;
    Py_RETURN_NONE;
}

static PyObject *lane_py_stop(LaneObject *self, PyObject *args)
{
    double seconds;
    if (!PyArg_ParseTuple(args, "d", &seconds))
        return NULL;
    if (!(seconds >= 0 && seconds <= 3600)) {
        PyErr_SetString(PyExc_ValueError, "seconds is out of range");
        return NULL;
    }
    return PyBool_FromLong(stop(self, (unsigned)(seconds * 1000)));
}

static unsigned long long now(const uint64_t *counter)
{
    return __atomic_load_n(counter, __ATOMIC_RELAXED);
}

static PyObject *histogram(const uint64_t *buckets)
{
    PyObject *list = PyList_New(BUCKETS);
    for (int i = 0; list && i < BUCKETS; i++) {
        PyObject *count =
            PyLong_FromUnsignedLongLong(now(&buckets[i]));
        if (!count)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, i, count);
    }
    return list;
}

static PyObject *lane_py_counters(LaneObject *self, PyObject *Py_UNUSED(ignored))
{
    const struct lane *lane = &self->lane;
    const struct lane_counters *counters = &lane->counters;
    return Py_BuildValue(
        "{sKsKsKsKsKsKsKsKsKsKsNsKsNsKsNsN}", "forwarded", now(&counters->forwarded), "queued",
        now(&counters->queued), "repeated", now(&counters->repeated), "together",
        now(&counters->together), "apart", now(&counters->apart), "fsyncs", now(&counters->fsyncs),
        "syncs", now(&counters->syncs), "missing", now(&counters->missing), "found",
        now(&counters->found), "told", now(&counters->told), "read_ns",
        histogram(lane->read_ns), "read_ns_sum", now(&lane->read_ns_sum), "write_ns",
        histogram(lane->write_ns), "write_ns_sum", now(&lane->write_ns_sum), "ring",
        PyBool_FromLong(lane->ring), "queues",
        PyBool_FromLong(__atomic_load_n(&lane->queues.open, __ATOMIC_ACQUIRE)));
}

static PyObject *get_queue(LaneObject *self, void *Py_UNUSED(closure))
{
    return PyLong_FromLong(self->lane.queue);
}

static PyObject *get_ended(LaneObject *self, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(__atomic_load_n(&self->lane.ended, __ATOMIC_ACQUIRE));
}

static PyObject *get_takes_queues(LaneObject *self, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(self->lane.queues.threads);
}

static PyMethodDef lane_methods[] = {
    {"take", (PyCFunction)lane_py_take, METH_NOARGS, NULL},
    {"reply", (PyCFunction)lane_py_reply, METH_VARARGS, NULL},
    {"open", (PyCFunction)lane_py_open, METH_VARARGS, NULL},
    {"close", (PyCFunction)lane_py_close, METH_VARARGS, NULL},
    {"open_directory", (PyCFunction)lane_py_open_directory, METH_VARARGS, NULL},
    {"close_directory", (PyCFunction)lane_py_close_directory, METH_VARARGS, NULL},
    {"keep_attributes", (PyCFunction)lane_py_keep_attributes, METH_VARARGS, NULL},
    {"drop_attributes", (PyCFunction)lane_py_drop_attributes, METH_VARARGS, NULL},
    {"invalidate", (PyCFunction)lane_py_invalidate, METH_VARARGS, NULL},
    {"enter", (PyCFunction)lane_py_enter, METH_VARARGS, NULL},
    {"leave", (PyCFunction)lane_py_leave, METH_VARARGS, NULL},
    {"bring_answers", (PyCFunction)lane_py_bring_answers, METH_VARARGS, NULL},
    {"make_room", (PyCFunction)lane_py_make_room, METH_NOARGS, NULL},
    {"stop", (PyCFunction)lane_py_stop, METH_VARARGS, NULL},
    {"counters", (PyCFunction)lane_py_counters, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef lane_attributes[] = {
    {"queue", (getter)get_queue, NULL, NULL, NULL},
    {"ended", (getter)get_ended, NULL, NULL, NULL},
    {"takes_queues", (getter)get_takes_queues, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyTypeObject LaneType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "fusecache.lane._lane.Lane",
    .tp_basicsize = sizeof(LaneObject),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = lane_new,
    .tp_dealloc = (destructor)lane_dealloc,
    .tp_methods = lane_methods,
    .tp_getset = lane_attributes,
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, .m_name = "fusecache.lane._lane", .m_size = -1};

PyMODINIT_FUNC PyInit__lane(void)
{
    PyObject *made = PyModule_Create(&module);
    if (!made || PyType_Ready(&LaneType) < 0 ||
        PyModule_AddObjectRef(made, "Lane", (PyObject *)&LaneType) < 0)
        return NULL;
    return made;
}
