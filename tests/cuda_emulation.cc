// The CUDA operators on the pretended GPU of cuda_on_cpu.h, with a C interface for tests/test_cuda_emulation.py, and
// the host side alone for tests/test_ptx.py, which runs their kernels elsewhere. Every tensor of the former lies flush
// against a page that can't be touched, so that reading or writing beyond one ends the process.
#include <sys/mman.h>
#include <unistd.h>

#include "../csrc/kernels/cuda/loratrf_cuda.cu"

using namespace loratrf;

namespace {

// `bytes` of memory that end where a forbidden page starts, or at the boundary of 16 bytes before it.
class Guarded {
 public:
  explicit Guarded(size_t bytes) : bytes_(bytes), page_(static_cast<size_t>(sysconf(_SC_PAGESIZE))) {
    size_ = (bytes / page_ + 2) * page_;
    map_ = static_cast<char*>(mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (map_ == MAP_FAILED) cuda_on_cpu::Fatal("no memory");
    mprotect(map_ + size_ - page_, page_, PROT_NONE);
    memset(map_, 0xff, size_ - page_);  // NaN in every type
  }
  ~Guarded() { munmap(map_, size_); }
  Guarded(const Guarded&) = delete;

  char* data() const { return map_ + size_ - page_ - bytes_; }
  size_t size() const { return bytes_; }

 private:
  size_t bytes_, page_, size_;
  char* map_;
};

}  // namespace

extern "C" {

// Sets the pretended GPU; returns the launches since the last call of this.
int loratrf_emulate_gpu(int multiprocessors, int backwards, int refuse_cooperative, int error) {
  auto& gpu = cuda_on_cpu::g_gpu;
  gpu.multiprocessors = multiprocessors, gpu.backwards = backwards, gpu.refuse_cooperative = refuse_cooperative;
  gpu.error = error;
  g_residency.blocks.clear();
  return std::exchange(gpu.launches, 0);
}

// The current device and the tensors' own. Fills state with the current device, that of the last launch, and how often
// the GPU was asked for its occupancy, and kernels were loaded, since the last call of this.
void loratrf_emulate_devices(int current, int tensors, int* state) {
  auto& gpu = cuda_on_cpu::g_gpu;
  state[0] = gpu.device, state[1] = gpu.launched_on;
  state[2] = std::exchange(gpu.asked, 0), state[3] = std::exchange(gpu.loaded, 0);
  gpu.device = current, gpu.tensors_device = tensors;
}

// A call of which the tensors are at `data`, in an order as below.
static Call CallOf(int type, int filter_input, const int64_t* sizes, const int64_t* adapter_ids, void* const* data) {
  Call call;
  call.type = static_cast<Type>(type);
  call.filter_input = static_cast<FilterInput>(filter_input);
  call.batch = sizes[0], call.T = sizes[0] * sizes[1];
  call.K = sizes[2], call.N = sizes[3], call.R = sizes[4], call.F = sizes[5], call.S = sizes[6];
  call.base = data[0], call.x = data[1], call.A.data = data[2], call.B.data = data[3];
  call.tau = data[4], call.C.data = data[5], call.D.data = data[6], call.y = data[7];
  call.adapter_ids = adapter_ids;
  return call;
}

// Launches alone, of a call whose tensors and `scratch` are addresses that the host doesn't read: `elsewhere` runs
// them. With scratch 0 nothing is launched. Returns the Status; *scratch_bytes is what the call needs.
int loratrf_launch(int type, int filter_input, const int64_t* sizes, const int64_t* adapter_ids, void* const* addresses,
                   void* scratch, size_t* scratch_bytes, decltype(cuda_on_cpu::Gpu::elsewhere) elsewhere) {
  const Call call = CallOf(type, filter_input, sizes, adapter_ids, addresses);
  Detail detail;
  Status status = CudaScratchSize(call, scratch_bytes, &detail);
  if (status != Status::kOk || !scratch) return static_cast<int>(status);
  cuda_on_cpu::g_gpu.elsewhere = elsewhere;
  status = CudaRun(call, scratch, nullptr, &detail);
  cuda_on_cpu::g_gpu.elsewhere = nullptr;
  return static_cast<int>(status);
}

// "Tiles float", "Split Half": what a kernel is called in the PTX.
const char* loratrf_kernel(const void* kernel) {
  const std::pair<const char*, void (*)(Work)> kernels[] = {
      {"Tiles float", Tiles<float>}, {"Tiles Half", Tiles<Half>}, {"Tiles BFloat16", Tiles<BFloat16>},
      {"Split float", Split<float>}, {"Split Half", Split<Half>}, {"Split BFloat16", Split<BFloat16>},
  };
  for (const auto& [name, address] : kernels) {
    if (reinterpret_cast<const void*>(address) == kernel) return name;
  }
  return "";
}

// sizes: batch, tokens, K, N, R, F, S. tensors and bytes: base, x, A, B, tau, C, D, y; null ones are absent. y is
// copied back; with in_place it is base's own memory. Returns the Status; *bad_row and *message say more.
int loratrf_emulate(int type, int filter_input, const int64_t* sizes, const int64_t* adapter_ids, void* const* tensors,
                    const int64_t* bytes, int in_place, int64_t* bad_row, const char** message) {
  std::vector<std::unique_ptr<Guarded>> memory;
  void* data[8] = {};
  for (int i = 0; i < 8; ++i) {
    if (!tensors[i]) continue;
    if (i == 7 && in_place) {
      data[7] = data[0];
      continue;
    }
    memory.push_back(std::make_unique<Guarded>(static_cast<size_t>(bytes[i])));
    data[i] = memory.back()->data();
    if (i < 7) memcpy(data[i], tensors[i], static_cast<size_t>(bytes[i]));
  }
  const Call call = CallOf(type, filter_input, sizes, adapter_ids, data);
  Detail detail;
  size_t scratch_bytes = 0;
  Status status = CudaScratchSize(call, &scratch_bytes, &detail);
  if (status == Status::kOk) {
    const Guarded scratch(scratch_bytes);
    status = CudaRun(call, scratch_bytes ? scratch.data() : nullptr, nullptr, &detail);
  }
  if (status == Status::kOk && data[7]) memcpy(tensors[7], data[7], static_cast<size_t>(bytes[7]));
  *bad_row = detail.bad_row, *message = detail.message;
  return static_cast<int>(status);
}
}
