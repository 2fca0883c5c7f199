// How does Python call a kernel in little time? Plain C functions take the tensors and compute the signature of a call.
//
// pybind11 takes 1.3 us to convert the 19 arguments of a kernel, and Python takes 0.13 us to ask a tensor for its address. Here
// all of them take 0.3 us. A tensor's address, sizes and strides come from the function table that torch.Tensor offers for
// DLPack (https://dmlc.github.io/dlpack, C exchange API). Its ABI is stable, so no torch header is included. Without that
// table (torch before 2.10) a tensor is asked for its data_ptr(), and no call has a signature.
#pragma once

#include <Python.h>

#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

namespace pyfused::python {

// DLPack 1: DLTensor and DLPackExchangeAPI.
struct View {
  char* data;
  int32_t device_type, device_id;  // types: 1 is the CPU, 2 CUDA, 10 ROCm
  int32_t dimensions;
  uint8_t kind, bits;
  uint16_t lanes;
  const int64_t *shape, *strides;  // strides count elements
  uint64_t byte_offset;
};
struct Exchange {
  uint32_t major, minor;
  const void *previous, *allocate, *from_tensor, *to_tensor;
  int (*view)(PyObject* tensor, View* out);
  const void* stream;
};

inline const Exchange* exchange = nullptr;
inline bool for_cpu = true;  // whether the extension's kernels run on the CPU
inline PyObject *tensor_type = nullptr, *parameter_type = nullptr;

// use_tensors(capsule, Tensor, Parameter): from now on the capsule's function table reads these two types.
inline PyObject* use_tensors(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 3) return PyErr_Format(PyExc_TypeError, "use_tensors takes 3 arguments, not %zd", count);
  auto* found = static_cast<const Exchange*>(PyCapsule_GetPointer(args[0], "dlpack_exchange_api"));
  if (!found) return nullptr;
  if (found->major == 1 && found->view) {
    Py_XSETREF(tensor_type, Py_NewRef(args[1]));
    Py_XSETREF(parameter_type, Py_NewRef(args[2]));
    exchange = found;
  }
  Py_RETURN_NONE;
}

inline bool is_plain_tensor(PyObject* value) {
  auto* type = reinterpret_cast<PyObject*>(Py_TYPE(value));
  return exchange && (type == tensor_type || type == parameter_type);
}

// ---- arguments of a kernel ------------------------------------------------------------------------------------------
// A failed conversion sets a Python exception. The caller checks for it once.

inline std::uintptr_t address(PyObject* value) {
  if (value == Py_None) return 0;
  if (is_plain_tensor(value)) {
    View view;
    if (exchange->view(value, &view)) return 0;
    if (for_cpu && view.device_type != 1) PyErr_SetString(PyExc_ValueError, "a CPU kernel was given a tensor of another device");
    return reinterpret_cast<std::uintptr_t>(view.data + view.byte_offset);
  }
  if (PyLong_Check(value)) return PyLong_AsUnsignedLongLong(value);
  PyObject* pointer = PyObject_CallMethod(value, "data_ptr", nullptr);
  if (!pointer) return 0;
  std::uintptr_t result = PyLong_AsUnsignedLongLong(pointer);
  Py_DECREF(pointer);
  return result;
}

template <typename T>
T argument(PyObject* value) {
  if constexpr (std::is_same_v<T, std::uintptr_t>) return address(value);
  else if constexpr (std::is_same_v<T, bool>) return PyObject_IsTrue(value) == 1;
  else if constexpr (std::is_floating_point_v<T>) return static_cast<T>(PyFloat_AsDouble(value));
  else return static_cast<T>(PyLong_AsLongLong(value));
}

// ---- a kernel as a Python function ----------------------------------------------------------------------------------
// A kernel touches no Python object, so it runs without the interpreter's lock.

template <auto kernel>
struct Function;

template <typename Result, typename... Arguments, Result (*kernel)(Arguments...)>
struct Function<kernel> {
  static PyObject* call(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (count != sizeof...(Arguments))
      return PyErr_Format(PyExc_TypeError, "the kernel takes %zu arguments, not %zd", sizeof...(Arguments), count);
    return run(args, std::index_sequence_for<Arguments...>());
  }

  template <std::size_t... i>
  static PyObject* run(PyObject* const* args, std::index_sequence<i...>) {
    std::tuple<Arguments...> values{argument<Arguments>(args[i])...};
    if (PyErr_Occurred()) return nullptr;
    PyThreadState* state = PyEval_SaveThread();
    if constexpr (std::is_void_v<Result>) {
      kernel(std::get<i>(values)...);
      PyEval_RestoreThread(state);
      Py_RETURN_NONE;
    } else {
      Result result = kernel(std::get<i>(values)...);
      PyEval_RestoreThread(state);
      return PyLong_FromLongLong(result);
    }
  }
};

template <auto kernel>
PyMethodDef function(const char* name) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&Function<kernel>::call)), METH_FASTCALL, nullptr};
}

// ---- the signature of a call ----------------------------------------------------------------------------------------
// signature(*args) -> bytes or None. Two calls have the same bytes exactly if they differ only in their tensors' values. It is
// None if an argument is neither None, bool, int, float, str nor a plain tensor on the CPU or a GPU, and if a tensor is a negated
// view (Tensor.is_neg), which a kernel would read with the wrong sign. A GPU tensor's signature
// includes its device and whether its address is a multiple of 16, because Triton compiles separately for that.

class Words {
 public:
  bool put(int64_t word) {
    if (used_ == kMost) return false;
    words_[used_++] = word;
    return true;
  }
  bool put(const void* bytes, Py_ssize_t size) {
    Py_ssize_t count = (size + 7) / 8;
    if (used_ + count > kMost) return false;
    if (size % 8) words_[used_ + count - 1] = 0;
    std::memcpy(words_ + used_, bytes, size);
    used_ += count;
    return true;
  }
  PyObject* bytes() const { return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(words_), used_ * 8); }

 private:
  static constexpr Py_ssize_t kMost = 256;
  Py_ssize_t used_ = 0;
  int64_t words_[kMost];
};

// Whether a tensor stands for its memory with the other sign, as z.conj().imag does. Such a tensor is a view of complex numbers, so
// its strides are all even. Most tensors need not be asked.
inline bool is_negated(PyObject* value, const View& view) {
  for (int32_t i = 0; i < view.dimensions; ++i)
    if (view.shape[i] > 1 && view.strides[i] % 2) return false;
  if (view.kind != 2) return false;  // 2: floating point, but not bfloat16, of which there are no complex numbers
  static PyObject* name = PyUnicode_InternFromString("is_neg");
  PyObject* found = PyObject_CallMethodNoArgs(value, name);
  int yes = found ? PyObject_IsTrue(found) : -1;
  Py_XDECREF(found);
  if (yes < 0) PyErr_Clear();
  return yes != 0;
}

// Each value begins with a word for its kind and length, so different lists of values never look the same.
inline bool describe(PyObject* value, Words& words) {
  enum : int64_t { kNone, kFalse, kTrue, kInt, kFloat, kText, kTensor };
  if (value == Py_None) return words.put(kNone);
  if (is_plain_tensor(value)) {
    View view;
    if (exchange->view(value, &view)) {
      PyErr_Clear();
      return false;
    }
    if (view.device_type != 1 && view.device_type != 2 && view.device_type != 10) return false;
    if (is_negated(value, view)) return false;
    int64_t head = kTensor | view.kind << 8 | view.bits << 16 | static_cast<int64_t>(view.device_type) << 24 |
                   static_cast<int64_t>(view.dimensions) << 32;
    Py_ssize_t size = view.dimensions * sizeof(int64_t);
    if (!words.put(head) || !words.put(view.shape, size) || !words.put(view.strides, size)) return false;
    if (view.device_type == 1) return true;
    bool aligned = reinterpret_cast<std::uintptr_t>(view.data + view.byte_offset) % 16 == 0;
    return words.put(static_cast<int64_t>(view.device_id) << 1 | aligned);
  }
  if (value == Py_False) return words.put(kFalse);
  if (value == Py_True) return words.put(kTrue);
  if (PyFloat_CheckExact(value)) {
    double number = PyFloat_AS_DOUBLE(value);
    return words.put(kFloat) && words.put(&number, sizeof number);
  }
  if (PyLong_CheckExact(value)) {
    int overflow;
    int64_t number = PyLong_AsLongLongAndOverflow(value, &overflow);
    return !overflow && words.put(kInt) && words.put(number);
  }
  if (PyUnicode_CheckExact(value)) {
    Py_ssize_t size;
    const char* text = PyUnicode_AsUTF8AndSize(value, &size);
    if (!text) PyErr_Clear();
    return text && words.put(kText | static_cast<int64_t>(size) << 8) && words.put(text, size);
  }
  return false;
}

inline PyObject* signature(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Words words;
  for (Py_ssize_t i = 0; i < count; ++i)
    if (!describe(args[i], words)) Py_RETURN_NONE;
  return words.bytes();
}

// ---- a call whose launch is prepared --------------------------------------------------------------------------------
// prepared(launches, forced, levels, otherwise, count, *watchers) -> run(*args). run() finds a launch in the dictionary
// `launches` under (value of the context variable `forced`, signature(*args)), calls it and returns its first `count` outputs:
// all of them for 0, the bare output for 1. It calls otherwise(*args) instead, or returns None if `otherwise` is None, in three
// cases: there is no launch, a watcher returns something true, or levels["_current_level"] >= 0 (a forward-mode derivative is
// being taken). Python would take 1 us more, and several us if other code has pushed this out of the caches.

inline PyObject* prepared_launch(PyObject* state, PyObject* const* args, Py_ssize_t count) {
  for (Py_ssize_t i = 5; i < PyTuple_GET_SIZE(state); ++i) {
    PyObject* found = PyObject_CallNoArgs(PyTuple_GET_ITEM(state, i));
    int yes = found ? PyObject_IsTrue(found) : -1;
    Py_XDECREF(found);
    if (yes) return nullptr;
  }
  static PyObject* name = PyUnicode_InternFromString("_current_level");
  PyObject* level = PyDict_GetItemWithError(PyTuple_GET_ITEM(state, 2), name);
  if (!level || PyLong_AsLong(level) >= 0) return nullptr;
  PyObject *forced = nullptr, *call = signature(nullptr, args, count), *launch = nullptr;
  if (call && call != Py_None && PyContextVar_Get(PyTuple_GET_ITEM(state, 1), nullptr, &forced) == 0 && forced) {
    if (PyObject* key = PyTuple_Pack(2, forced, call)) {
      launch = Py_XNewRef(PyDict_GetItemWithError(PyTuple_GET_ITEM(state, 0), key));
      Py_DECREF(key);
    }
  }
  Py_XDECREF(forced);
  Py_XDECREF(call);
  return launch;
}

inline PyObject* prepared_run(PyObject* state, PyObject* const* args, Py_ssize_t count, PyObject* names) {
  PyObject* launch = names ? nullptr : prepared_launch(state, args, count);
  if (!launch) {
    if (PyErr_Occurred()) return nullptr;
    PyObject* otherwise = PyTuple_GET_ITEM(state, 3);
    return otherwise == Py_None ? Py_NewRef(Py_None) : PyObject_Vectorcall(otherwise, args, count, names);
  }
  PyObject* outputs = PyObject_Vectorcall(launch, args, count, nullptr);
  Py_DECREF(launch);
  Py_ssize_t wanted = PyLong_AsSsize_t(PyTuple_GET_ITEM(state, 4));
  if (!outputs || wanted == 0) return outputs;
  PyObject* first = wanted == 1 ? PySequence_GetItem(outputs, 0) : PySequence_GetSlice(outputs, 0, wanted);
  Py_DECREF(outputs);
  return first;
}

inline PyObject* prepared(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count < 5 || !PyDict_Check(args[0]) || !PyContextVar_CheckExact(args[1]) || !PyDict_Check(args[2]) || !PyLong_Check(args[4]))
    return PyErr_Format(PyExc_TypeError, "prepared takes a dict, a ContextVar, a dict, a function or None, an int and functions");
  static PyMethodDef run = {"prepared", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&prepared_run)),
                            METH_FASTCALL | METH_KEYWORDS, nullptr};
  PyObject* state = PyTuple_New(count);
  if (!state) return nullptr;
  for (Py_ssize_t i = 0; i < count; ++i) PyTuple_SET_ITEM(state, i, Py_NewRef(args[i]));
  PyObject* made = PyCFunction_New(&run, state);
  Py_DECREF(state);
  return made;
}

}  // namespace pyfused::python
