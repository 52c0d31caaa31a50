// A module of Python's with kernels of Inductor's, which return nothing; `together.py` puts their text below this one.
// Tensors are handed over as they are, and their memory is what a kernel gets, as with Inductor's own bindings.

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <type_traits>
#include <utility>

static void* (*memory_of)(PyObject* tensor);  // torch's own, which raises for anything else

template <class T> static T argument(PyObject* value) {
    if constexpr (std::is_pointer_v<T>) {
        return static_cast<T>(memory_of(value));
    } else {
        T number;
        if constexpr (std::is_floating_point_v<T>) number = static_cast<T>(PyFloat_AsDouble(value));
        else number = static_cast<T>(PyLong_AsLongLong(value));
        if (number == static_cast<T>(-1) && PyErr_Occurred()) throw std::runtime_error("expected a number");
        return number;
    }
}

template <class... T, std::size_t... I>
static void call(void (*kernel)(T...), PyObject* arguments, std::index_sequence<I...>) {
    kernel(argument<T>(PyTuple_GET_ITEM(arguments, I))...);
}

template <class... T> static PyObject* run(void (*kernel)(T...), PyObject* arguments) {
    try {
        if (PyTuple_GET_SIZE(arguments) != sizeof...(T)) throw std::runtime_error("wrong number of arguments");
        call(kernel, arguments, std::index_sequence_for<T...>{});
        Py_RETURN_NONE;
    } catch (std::exception const& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
    } catch (...) {
        PyErr_SetString(PyExc_RuntimeError, "unhandled error");
    }
    return nullptr;
}

#define FUNCTION(I) \
    {"kernel_" #I, [](PyObject*, PyObject* all) { return run(source_##I::kernel_##I, all); }, METH_VARARGS, ""}

#ifdef Py_GIL_DISABLED
#define WITHOUT_LOCK(module) PyUnstable_Module_SetGIL(module, Py_MOD_GIL_NOT_USED)
#else
#define WITHOUT_LOCK(module)
#endif

#define MODULE(...) \
    static PyMethodDef functions[] = {__VA_ARGS__, {NULL, NULL, 0, NULL}}; \
    static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "kernel", NULL, -1, functions}; \
    PyMODINIT_FUNC PyInit_kernel(void) { \
        const char* address = std::getenv("_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR"); \
        if (!address) { \
            PyErr_SetString(PyExc_RuntimeError, "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR must be set"); \
            return nullptr; \
        } \
        memory_of = reinterpret_cast<decltype(memory_of)>(std::strtoull(address, nullptr, 10)); \
        PyObject* module = PyModule_Create(&definition); \
        if (module) { WITHOUT_LOCK(module); } \
        return module; \
    }
