// Is what Python holds still what it held before? A step that skips a model's modules asks thousands of such questions, and Python
// takes 0.1 us or more for each.
//
// unchanged(questions) -> bool. A question is (kind, owners, key, expected); owners and expected are tuples of one length.
//     0: type(owner) is expected
//     1: owner.get(key) is expected; owners are dicts, and without the key the value is None
//     2: owner.get(key) is empty or None
//     3: owner.get(key) is a dict whose keys and values are, in order, the same objects as in the flat tuple `expected`
// memory(tensors) -> bytes or None. They are equal exactly if each tensor has the same address, sizes, strides, dtype and device.
// None if one is no plain tensor on the CPU or a GPU.
#pragma once

#include "python_call.h"

namespace pyfused::python {

inline bool holds_items(PyObject* value, PyObject* expected) {
  if (!value || !PyDict_CheckExact(value)) return false;
  PyObject *key, *item;
  Py_ssize_t at = 0, count = 0;
  const Py_ssize_t all = PyTuple_GET_SIZE(expected);
  while (PyDict_Next(value, &at, &key, &item)) {
    if (count == all || PyTuple_GET_ITEM(expected, count) != key || PyTuple_GET_ITEM(expected, count + 1) != item) return false;
    count += 2;
  }
  return count == all;
}

inline bool holds(long kind, PyObject* owner, PyObject* key, PyObject* expected) {
  if (kind == 0) return reinterpret_cast<PyObject*>(Py_TYPE(owner)) == expected;
  PyObject* value = PyDict_GetItemWithError(owner, key);
  if (kind == 1) return (value ? value : Py_None) == expected;
  if (kind == 2) return !value || value == Py_None || (PyDict_Check(value) && PyDict_GET_SIZE(value) == 0);
  return holds_items(value, expected);
}

inline PyObject* unchanged(PyObject*, PyObject* questions) {
  if (!PyTuple_Check(questions)) return PyErr_Format(PyExc_TypeError, "unchanged takes a tuple of questions");
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(questions); ++i) {
    PyObject *key, *owners, *expected;
    int kind;
    if (!PyArg_ParseTuple(PyTuple_GET_ITEM(questions, i), "iO!OO!", &kind, &PyTuple_Type, &owners, &key, &PyTuple_Type, &expected))
      return nullptr;
    if (PyTuple_GET_SIZE(owners) != PyTuple_GET_SIZE(expected)) return PyErr_Format(PyExc_ValueError, "owners and expected differ");
    for (Py_ssize_t j = 0; j < PyTuple_GET_SIZE(owners); ++j) {
      if (holds(kind, PyTuple_GET_ITEM(owners, j), key, PyTuple_GET_ITEM(expected, j))) continue;
      if (PyErr_Occurred()) return nullptr;
      Py_RETURN_FALSE;
    }
  }
  Py_RETURN_TRUE;
}

inline PyObject* memory(PyObject*, PyObject* tensors) {
  constexpr Py_ssize_t kMostDimensions = 8, kWords = 3 + 2 * kMostDimensions;
  if (!PyTuple_Check(tensors)) return PyErr_Format(PyExc_TypeError, "memory takes a tuple of tensors");
  const Py_ssize_t count = PyTuple_GET_SIZE(tensors);
  PyObject* made = PyBytes_FromStringAndSize(nullptr, count * kWords * sizeof(int64_t));
  if (!made) return nullptr;
  auto* words = reinterpret_cast<int64_t*>(PyBytes_AS_STRING(made));
  std::memset(words, 0, count * kWords * sizeof(int64_t));
  for (Py_ssize_t i = 0; i < count; ++i, words += kWords) {
    PyObject* tensor = PyTuple_GET_ITEM(tensors, i);
    View view;
    bool read = is_plain_tensor(tensor) && exchange->view(tensor, &view) == 0;
    if (!read || (view.device_type != 1 && view.device_type != 2 && view.device_type != 10) || view.dimensions > kMostDimensions) {
      PyErr_Clear();
      Py_DECREF(made);
      Py_RETURN_NONE;
    }
    words[0] = static_cast<int64_t>(reinterpret_cast<std::uintptr_t>(view.data + view.byte_offset));
    words[1] = view.kind | view.bits << 8 | static_cast<int64_t>(view.dimensions) << 32;
    words[2] = view.device_type | static_cast<int64_t>(view.device_id) << 32;
    std::memcpy(words + 3, view.shape, view.dimensions * sizeof(int64_t));
    std::memcpy(words + 3 + kMostDimensions, view.strides, view.dimensions * sizeof(int64_t));
  }
  return made;
}

}  // namespace pyfused::python
