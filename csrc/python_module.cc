// The operators for Python: loratrf_deploy._kernels. Takes whatever lends its memory through the buffer protocol
// (numpy) or DLPack (torch); needs the headers of neither. Used through loratrf_deploy.ops.torch_ops and the tests.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <string>
#include <thread>
#include <vector>

#include "dispatch.h"
#include "dlpack.h"
#include "kernels/cuda/loratrf_cuda.h"
#include "parallel.h"

namespace py = pybind11;

namespace loratrf {
namespace {

// A borrowed tensor: C-contiguous, on the CPU or on a CUDA device. `buffer` or `capsule` keeps the memory.
struct Borrowed {
  py::buffer_info buffer;
  py::object capsule;
  void* data;
  Shape shape;
  Type type;  // of one that isn't int64
  int32_t device_id = 0;
};

[[noreturn]] void TypeFault(const char* name, const std::string& got, const std::string& expected) {
  throw py::type_error(std::string(name) + " is " + got + ", expected " + expected + ".");
}

const char* TypesOf(const char* name) { return IsAdapterIds(name) ? "int64" : "float32, float16 or bfloat16"; }

Borrowed FromBuffer(const py::buffer& source, const char* name, bool writable) {
  Borrowed tensor;
  py::buffer_info info = source.request(writable);
  if (IsAdapterIds(name)) {
    const bool is_int64 = info.itemsize == 8 && (info.format == "l" || info.format == "q");
    if (!is_int64) TypeFault(name, "of buffer format \"" + info.format + "\"", TypesOf(name));
  } else if (info.format == "f" && info.itemsize == 4) {
    tensor.type = Type::kFloat32;
  } else if (info.format == "e" && info.itemsize == 2) {
    tensor.type = Type::kFloat16;
  } else {
    TypeFault(name, "of buffer format \"" + info.format + "\"", TypesOf(name));
  }
  tensor.shape.assign(info.shape.begin(), info.shape.end());
  py::ssize_t stride = info.itemsize;
  for (size_t i = info.shape.size(); i-- > 0; stride *= info.shape[i]) {
    if (info.size > 0 && info.shape[i] > 1 && info.strides[i] != stride) {
      throw py::value_error(std::string(name) + " is strided, expected it C-contiguous: pass a contiguous copy.");
    }
  }
  tensor.data = info.ptr;
  tensor.buffer = std::move(info);
  return tensor;
}

// device: the DLPack type of the device that the tensor must be on.
Borrowed FromDlpack(const py::object& source, const char* name, int32_t device) {
  Borrowed tensor;
  // -1: the caller sees to the order of streams. On the CPU there are none.
  const py::object stream = device == dlpack::kCuda ? py::object(py::int_(-1)) : py::object(py::none());
  const py::object capsule = source.attr("__dlpack__")(py::arg("stream") = stream);
  auto* managed = static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
  if (!managed) throw py::error_already_set();
  const dlpack::Tensor& lent = managed->tensor;
  if (lent.device.type != device) {
    TypeFault(name, "on device type " + std::to_string(lent.device.type),
              device == dlpack::kCpu ? "a CPU tensor" : "a CUDA tensor");
  }
  const auto is = [&](uint8_t code, uint8_t bits) {
    return lent.dtype.code == code && lent.dtype.bits == bits && lent.dtype.lanes == 1;
  };
  const bool ids = IsAdapterIds(name);
  if (ids && is(dlpack::kIntCode, 64)) {
    tensor.type = Type::kFloat32;  // nobody reads it
  } else if (!ids && is(dlpack::kFloatCode, 32)) {
    tensor.type = Type::kFloat32;
  } else if (!ids && is(dlpack::kFloatCode, 16)) {
    tensor.type = Type::kFloat16;
  } else if (!ids && is(dlpack::kBFloatCode, 16)) {
    tensor.type = Type::kBFloat16;
  } else {
    TypeFault(name, "of DLPack type " + std::to_string(lent.dtype.code) + "/" + std::to_string(lent.dtype.bits),
              TypesOf(name));
  }
  tensor.shape.assign(lent.shape, lent.shape + lent.ndim);
  const bool empty = std::find(tensor.shape.begin(), tensor.shape.end(), 0) != tensor.shape.end();
  int64_t stride = 1;
  for (int32_t i = lent.ndim; lent.strides && !empty && i-- > 0; stride *= lent.shape[i]) {
    if (lent.shape[i] > 1 && lent.strides[i] != stride) {
      throw py::value_error(std::string(name) + " is strided, expected it C-contiguous: pass a contiguous copy.");
    }
  }
  tensor.data = static_cast<char*>(lent.data) + lent.byte_offset;
  tensor.device_id = lent.device.id;
  tensor.capsule = capsule;  // its destructor gives the tensor back
  return tensor;
}

Borrowed Borrow(const py::handle& source, const char* name, bool writable, int32_t device = dlpack::kCpu) {
  if (device == dlpack::kCpu && PyObject_CheckBuffer(source.ptr())) {
    return FromBuffer(py::reinterpret_borrow<py::buffer>(source), name, writable);
  }
  if (py::hasattr(source, "__dlpack__")) return FromDlpack(py::reinterpret_borrow<py::object>(source), name, device);
  TypeFault(name, "a " + std::string(py::str(py::type::handle_of(source).attr("__name__"))),
            "a numpy array or a torch tensor");
}

void Raise(const Fault& fault) {
  if (!fault) return;
  if (fault.status == Status::kOutOfMemory) throw std::bad_alloc();
  if (fault.status == Status::kDevice) throw std::runtime_error(fault.message);
  throw py::value_error(fault.message);
}

const Isa* g_forced_isa = nullptr;  // guarded by the GIL

const Isa* CurrentIsa() {
  if (g_forced_isa) return g_forced_isa;
  const Isa* isa = nullptr;
  Raise(ChooseIsa(&isa));
  return isa;
}

// A call, and the tensors that it points into.
struct Arguments {
  std::vector<Borrowed> tensors;
  Borrowed y;
  Call call;
};

// Borrows tensors of one type and device, with shapes that fit.
Arguments Take(Op op, const std::vector<py::object>& sources, const py::object& out, const std::string& filter_input,
               int32_t device, int64_t max_rank) {
  const OpInfo& info = InfoOf(op);
  Arguments taken;
  std::vector<Input> inputs;
  const auto check_place = [&](const Borrowed& tensor, const char* name) {
    const int32_t place = taken.tensors[0].device_id;
    if (tensor.device_id == place) return;
    TypeFault(name, "on device " + std::to_string(tensor.device_id),
              "all tensors on device " + std::to_string(place) + ", where " + info.inputs[0] + " is");
  };
  for (size_t i = 0; i < sources.size(); ++i) {
    const char* name = info.inputs[i];
    const bool ids = IsAdapterIds(name);
    taken.tensors.push_back(Borrow(sources[i], name, false, ids ? dlpack::kCpu : device));
    const Borrowed& tensor = taken.tensors[i];
    inputs.push_back({tensor.shape, tensor.data, nullptr});
    if (ids) continue;
    if (tensor.type != taken.tensors[0].type) {
      TypeFault(name, "of another dtype than " + std::string(info.inputs[0]), "one dtype for all tensors");
    }
    check_place(tensor, name);
  }
  taken.y = Borrow(out, "out", true, device);
  check_place(taken.y, "out");
  taken.call.type = taken.tensors[0].type;
  taken.call.y = taken.y.data;
  if (taken.y.type != taken.call.type) {
    TypeFault("out", "of another dtype than the inputs", "one dtype for all tensors");
  }
  Raise(FillCall(op, inputs, max_rank, &taken.call));
  if (const Shape& shape = inputs[0].shape; taken.y.shape != shape) {
    throw py::value_error(std::string(info.name) + ": out is " + Describe(taken.y.shape) + ", expected " +
                          Describe(shape) + ".");
  }
  Raise(ParseFilterInput(op, filter_input, &taken.call.filter_input));
  return taken;
}

// Packs the call's weights, as a session does with constant ones. Returns where they are now.
std::vector<std::vector<float>> PackWeights(const Isa* isa, Call* call) {
  const struct {
    Weight* weight;
    int64_t rows, cols;
  } all[] = {{&call->A, call->R, call->K},
             {&call->B, call->N, call->R},
             {&call->C, call->F, call->N},
             {&call->D, call->N, call->F}};
  std::vector<std::vector<float>> memory;
  for (const auto& [weight, rows, cols] : all) {
    if (!weight->data) continue;
    memory.emplace_back(PackedSize(isa, rows, cols));
    Pack(isa, call->type, rows, cols, weight->data, memory.back().data());
    weight->packed = memory.back().data();
  }
  return memory;
}

// Runs op on its inputs into out; threads < 1 stands for all of the machine's.
void Compute(Op op, const std::vector<py::object>& inputs, const py::object& out, const std::string& filter_input,
             int threads, bool prepack) {
  Arguments taken = Take(op, inputs, out, filter_input, dlpack::kCpu, kMaxRank);
  const Isa* isa = CurrentIsa();
  if (threads < 1) threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  Fault fault;
  {
    py::gil_scoped_release unlocked;
    std::vector<std::vector<float>> memory;
    if (prepack) memory = PackWeights(isa, &taken.call);
    fault = Run(op, isa, Threads(&threads), taken.call);
  }
  Raise(fault);
}

#ifdef LORATRF_WITH_CUDA
// Queues op on `stream` of the tensors' device, which must be the current one. allocate(bytes) returns a device tensor.
void ComputeOnCuda(const std::string& name, const std::vector<py::object>& inputs, const py::object& out,
                   const std::string& filter_input, uintptr_t stream, const py::function& allocate) {
  const auto* op = std::find_if(std::begin(kOps), std::end(kOps), [&](Op o) { return InfoOf(o).name == name; });
  if (op == std::end(kOps) || inputs.size() != InfoOf(*op).inputs.size()) {
    throw py::value_error("No operator " + name + " of " + std::to_string(inputs.size()) + " inputs.");
  }
  const Arguments taken = Take(*op, inputs, out, filter_input, dlpack::kCuda, kMaxCudaRank);
  size_t bytes = 0;
  Raise(ScratchOnCuda(*op, taken.call, &bytes));
  py::object scratch;  // keeps the memory until the launches are queued
  uintptr_t address = 0;
  if (bytes) {
    scratch = allocate(bytes);
    address = scratch.attr("data_ptr")().cast<uintptr_t>();
  }
  Raise(RunOnCuda(*op, taken.call, reinterpret_cast<void*>(address), reinterpret_cast<void*>(stream)));
}
#endif

}  // namespace
}  // namespace loratrf

PYBIND11_MODULE(_kernels, m) {
  using namespace loratrf;
  using Object = py::object;
  m.doc() = "The operators on CPU tensors, each into an `out` of the first input's shape (which may be that input).";
  m.attr("MAX_RANK") = kMaxRank;
  py::dict ops;
  for (Op op : kOps) {
    py::list inputs;
    for (const char* input : InfoOf(op).inputs) inputs.append(input);
    ops[InfoOf(op).name] = inputs;
  }
  m.attr("OPS") = ops;
  m.def(
      "low_rank",
      [](Object base, Object x, Object A, Object B, Object out, int threads, bool prepack) {
        Compute(Op::kLowRank, {base, x, A, B}, out, "adapted", threads, prepack);
      },
      py::arg("base"), py::arg("x"), py::arg("A"), py::arg("B"), py::arg("out"), py::kw_only(), py::arg("threads") = 0,
      py::arg("prepack") = false, "out = base + (x Aᵀ) Bᵀ");
  m.def(
      "task_filter",
      [](Object z, Object tau, Object C, Object D, Object out, int threads, bool prepack) {
        Compute(Op::kTaskFilter, {z, tau, C, D}, out, "adapted", threads, prepack);
      },
      py::arg("z"), py::arg("tau"), py::arg("C"), py::arg("D"), py::arg("out"), py::kw_only(), py::arg("threads") = 0,
      py::arg("prepack") = false, "out = z + ((s·z) Cᵀ) Dᵀ");
  m.def(
      "lora_trf",
      [](Object base, Object x, Object A, Object B, Object tau, Object C, Object D, Object out,
         const std::string& filter_input, int threads,
         bool prepack) { Compute(Op::kLoraTrf, {base, x, A, B, tau, C, D}, out, filter_input, threads, prepack); },
      py::arg("base"), py::arg("x"), py::arg("A"), py::arg("B"), py::arg("tau"), py::arg("C"), py::arg("D"),
      py::arg("out"), py::arg("filter_input") = "adapted", py::kw_only(), py::arg("threads") = 0,
      py::arg("prepack") = false, "out = h + ((s·z) Cᵀ) Dᵀ, h = base + (x Aᵀ) Bᵀ, z = h or base");
  m.def(
      "grouped_lora_trf",
      [](Object base, Object x, Object A, Object B, Object tau, Object C, Object D, Object adapter_ids, Object out,
         const std::string& filter_input, int threads) {
        Compute(Op::kGroupedLoraTrf, {base, x, A, B, tau, C, D, adapter_ids}, out, filter_input, threads, false);
      },
      py::arg("base"), py::arg("x"), py::arg("A"), py::arg("B"), py::arg("tau"), py::arg("C"), py::arg("D"),
      py::arg("adapter_ids"), py::arg("out"), py::arg("filter_input") = "adapted", py::kw_only(),
      py::arg("threads") = 0, "lora_trf with the weights of slot adapter_ids[row], row by row; base for id -1");
#ifdef LORATRF_WITH_CUDA
  m.attr("MAX_CUDA_RANK") = kMaxCudaRank;
  m.def("run_on_cuda", ComputeOnCuda, py::arg("op"), py::arg("inputs"), py::arg("out"), py::arg("filter_input"),
        py::kw_only(), py::arg("stream"), py::arg("allocate"),
        "Queues the ONNX operator `op` on CUDA tensors of the current device; adapter_ids are on the CPU.");
#endif
  m.def("isa", [] { return IsaName(CurrentIsa()); }, "Name of the instruction set in use.");
  m.def(
      "isas",
      [] {
        py::list names;
        for (const char* name : {"baseline", "avx2", "avx512", "lanes16"}) {
          if (FindIsa(name)) names.append(name);
        }
        return names;
      },
      "Names of the instruction sets that this build has and this CPU can run.");
  m.def(
      "set_isa",
      [](const std::string& name) {
        const Isa* isa = FindIsa(name.c_str());
        if (!isa) throw py::value_error("Instruction set \"" + name + "\" is not in this build or not in this CPU.");
        g_forced_isa = name.empty() ? nullptr : isa;
      },
      py::arg("name"), "Forces an instruction set; \"\" goes back to LORATRF_ISA or the best one.");
}
