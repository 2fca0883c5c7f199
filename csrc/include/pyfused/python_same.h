// Is what Python holds still what it held before? A step that skips a model's modules asks thousands of such questions, and Python
// takes 0.1 us or more for each.
//
// unchanged(groups) -> bool. A group is (owners, questions), a question (kind, key, expected); owners and expected are tuples of one
// length. All questions are put to one owner before the next, so that its dict comes from memory once.
//     0: owner.get(key) is expected; owners are dicts, and without the key the value is None
//     1: owner.get(key) is empty or None
//     2: owner.get(key) is a dict whose keys and values are, in order, the same objects as in the flat tuple `expected`
//     3: type(expected[0]) is expected[1], whatever the owner: an owner is its module's dict
// memory(tensors) -> bytes or None. They are equal exactly if each tensor has the same address, sizes, strides, dtype and device.
// None if one is no plain tensor on the CPU or a GPU. same_memory(tensors, known) -> memory(tensors) == known, and builds nothing.
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

inline bool holds(int kind, PyObject* owner, PyObject* key, PyObject* expected) {
  if (kind == 3) return reinterpret_cast<PyObject*>(Py_TYPE(PyTuple_GET_ITEM(expected, 0))) == PyTuple_GET_ITEM(expected, 1);
  PyObject* value = PyDict_GetItemWithError(owner, key);
  if (kind == 0) return (value ? value : Py_None) == expected;
  if (kind == 1) return !value || value == Py_None || (PyDict_Check(value) && PyDict_GET_SIZE(value) == 0);
  return holds_items(value, expected);
}

inline PyObject* unchanged(PyObject*, PyObject* groups) {
  constexpr Py_ssize_t kMost = 16;
  if (!PyTuple_Check(groups)) return PyErr_Format(PyExc_TypeError, "unchanged takes a tuple of groups");
  for (Py_ssize_t g = 0; g < PyTuple_GET_SIZE(groups); ++g) {
    PyObject *owners, *questions, *key[kMost], *expected[kMost];
    int kind[kMost];
    if (!PyArg_ParseTuple(PyTuple_GET_ITEM(groups, g), "O!O!", &PyTuple_Type, &owners, &PyTuple_Type, &questions)) return nullptr;
    const Py_ssize_t count = PyTuple_GET_SIZE(questions), all = PyTuple_GET_SIZE(owners);
    if (count > kMost) return PyErr_Format(PyExc_ValueError, "a group has at most %zd questions", kMost);
    for (Py_ssize_t q = 0; q < count; ++q) {
      PyObject* question = PyTuple_GET_ITEM(questions, q);
      if (!PyArg_ParseTuple(question, "iOO!", kind + q, key + q, &PyTuple_Type, expected + q)) return nullptr;
      if (PyTuple_GET_SIZE(expected[q]) != all) return PyErr_Format(PyExc_ValueError, "owners and expected differ in number");
    }
    for (Py_ssize_t i = 0; i < all; ++i)
      for (Py_ssize_t q = 0; q < count; ++q) {
        if (holds(kind[q], PyTuple_GET_ITEM(owners, i), key[q], PyTuple_GET_ITEM(expected[q], i))) continue;
        if (PyErr_Occurred()) return nullptr;
        Py_RETURN_FALSE;
      }
  }
  Py_RETURN_TRUE;
}

// ---- memory ---------------------------------------------------------------------------------------------------------

struct Place {
  static constexpr int kMostDimensions = 4;
  int64_t address, kind, device, sizes[2 * kMostDimensions];

  // Whether the tensor can be read.
  bool read(PyObject* tensor) {
    View view;
    if (!is_plain_tensor(tensor)) return false;
    if (exchange->view(tensor, &view)) {
      PyErr_Clear();
      return false;
    }
    if (view.device_type != 1 && view.device_type != 2 && view.device_type != 10) return false;
    if (view.dimensions > kMostDimensions) return false;
    std::memset(this, 0, sizeof *this);
    address = static_cast<int64_t>(reinterpret_cast<std::uintptr_t>(view.data + view.byte_offset));
    kind = view.kind | view.bits << 8 | static_cast<int64_t>(view.dimensions) << 32;
    device = view.device_type | static_cast<int64_t>(view.device_id) << 32;
    std::memcpy(sizes, view.shape, view.dimensions * sizeof(int64_t));
    std::memcpy(sizes + kMostDimensions, view.strides, view.dimensions * sizeof(int64_t));
    return true;
  }
};

inline PyObject* memory(PyObject*, PyObject* tensors) {
  if (!PyTuple_Check(tensors)) return PyErr_Format(PyExc_TypeError, "memory takes a tuple of tensors");
  const Py_ssize_t count = PyTuple_GET_SIZE(tensors);
  PyObject* made = PyBytes_FromStringAndSize(nullptr, count * sizeof(Place));
  if (!made) return nullptr;
  for (Py_ssize_t i = 0; i < count; ++i) {
    Place place;
    if (!place.read(PyTuple_GET_ITEM(tensors, i))) {
      Py_DECREF(made);
      Py_RETURN_NONE;
    }
    std::memcpy(PyBytes_AS_STRING(made) + i * sizeof place, &place, sizeof place);
  }
  return made;
}

inline PyObject* same_memory(PyObject*, PyObject* const* args, Py_ssize_t given) {
  if (given != 2 || !PyTuple_Check(args[0]) || !PyBytes_Check(args[1]))
    return PyErr_Format(PyExc_TypeError, "same_memory takes a tuple of tensors and the bytes of memory()");
  const Py_ssize_t count = PyTuple_GET_SIZE(args[0]);
  if (PyBytes_GET_SIZE(args[1]) != count * static_cast<Py_ssize_t>(sizeof(Place))) Py_RETURN_FALSE;
  for (Py_ssize_t i = 0; i < count; ++i) {
    Place place;
    if (!place.read(PyTuple_GET_ITEM(args[0], i))) Py_RETURN_FALSE;
    if (std::memcmp(PyBytes_AS_STRING(args[1]) + i * sizeof place, &place, sizeof place)) Py_RETURN_FALSE;
  }
  Py_RETURN_TRUE;
}

}  // namespace pyfused::python
