// The built library against a double-precision loop, opened as a user's program opens it: for systems and machines
// whose Python isn't here (tests/test_wheels.py runs it under qemu-user and wine).
//
//   library_selftest LIBRARY      prints "all passed" and exits with 0, or what differs and 1
#include <math.h>
#include <stdint.h>
#include <stdio.h>

#include <vector>
#ifdef _WIN32
#include <windows.h>
#else
#include <dlfcn.h>
#endif

namespace {

void* Symbol(const char* path, const char* name) {
#ifdef _WIN32
  HMODULE library = LoadLibraryA(path);
  return library ? reinterpret_cast<void*>(GetProcAddress(library, name)) : nullptr;
#else
  void* library = dlopen(path, RTLD_NOW);
  if (!library) printf("%s\n", dlerror());
  return library ? dlsym(library, name) : nullptr;
#endif
}

using Run = int (*)(int, int, const int64_t*, const char*, const char*, int, int);

struct Tensor {
  std::vector<int64_t> shape;
  std::vector<float> values;
};

Tensor Make(std::vector<int64_t> shape, uint32_t seed) {
  size_t size = 1;
  for (int64_t dimension : shape) size *= static_cast<size_t>(dimension);
  Tensor tensor{shape, std::vector<float>(size)};
  for (float& value : tensor.values) {
    seed = seed * 1664525u + 1013904223u;
    value = (static_cast<float>(seed >> 8) / (1 << 24) - 0.5f) / 4;
  }
  return tensor;
}

// h = base + (x A^T) B^T;  s = clamp(<h,tau> / (|h| |tau|), 0, 1);  y = h + ((s h) C^T) D^T, the largest error of y.
double WorstError(const std::vector<Tensor>& in, const Tensor& y, int64_t T, int64_t K, int64_t N, int64_t R,
                  int64_t F) {
  const auto at = [&](int i, int64_t row, int64_t column, int64_t columns) {
    return static_cast<double>(in[static_cast<size_t>(i)].values[static_cast<size_t>(row * columns + column)]);
  };
  double worst = 0;
  for (int64_t t = 0; t < T; ++t) {
    std::vector<double> u(R), h(N), v(F);
    double hh = 0, ht = 0, tt = 0;
    for (int64_t r = 0; r < R; ++r) {
      for (int64_t k = 0; k < K; ++k) u[r] += at(1, t, k, K) * at(2, r, k, K);
    }
    for (int64_t n = 0; n < N; ++n) {
      h[n] = at(0, t, n, N);
      for (int64_t r = 0; r < R; ++r) h[n] += u[r] * at(3, n, r, R);
      hh += h[n] * h[n], ht += h[n] * at(4, 0, n, N), tt += at(4, 0, n, N) * at(4, 0, n, N);
    }
    const double s = fmin(fmax(ht / (sqrt(hh) * sqrt(tt)), 0), 1);
    for (int64_t f = 0; f < F; ++f) {
      for (int64_t n = 0; n < N; ++n) v[f] += s * h[n] * at(5, f, n, N);
    }
    for (int64_t n = 0; n < N; ++n) {
      double expected = h[n];
      for (int64_t f = 0; f < F; ++f) expected += v[f] * at(6, n, f, F);
      // Not fmax, which would pass over NaN.
      const double error = fabs(static_cast<double>(y.values[static_cast<size_t>(t * N + n)]) - expected);
      if (!(error <= worst)) worst = error;
    }
  }
  return worst;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 2) return printf("expected the library's path\n"), 2;
  const auto run = reinterpret_cast<Run>(Symbol(arguments[1], "loratrf_run"));
  if (!run || !Symbol(arguments[1], "RegisterCustomOps")) return printf("%s doesn't load\n", arguments[1]), 1;
  constexpr int kLoraTrf = 2, kFloat32 = 0;
  bool passed = true;
  for (int64_t T : {1, 5, 131}) {
    const int64_t K = 99, N = 600, R = 19, F = 7;
    std::vector<Tensor> in = {Make({T, N}, 1), Make({T, K}, 2), Make({R, K}, 3), Make({N, R}, 4),
                              Make({N}, 5),    Make({F, N}, 6), Make({N, F}, 7)};
    Tensor y = Make({T, N}, 8);
    std::vector<int64_t> numbers;
    for (const Tensor* tensor : {&in[0], &in[1], &in[2], &in[3], &in[4], &in[5], &in[6], &y}) {
      numbers.push_back(static_cast<int64_t>(reinterpret_cast<uintptr_t>(tensor->values.data())));
      numbers.push_back(static_cast<int64_t>(tensor->shape.size()));
      numbers.insert(numbers.end(), tensor->shape.begin(), tensor->shape.end());
    }
    for (const char* isa : {"baseline", ""}) {
      for (int threads : {1, 3}) {
        y.values.assign(y.values.size(), NAN);
        const int status = run(kLoraTrf, kFloat32, numbers.data(), "adapted", isa, threads, threads == 3);
        const double error = status ? NAN : WorstError(in, y, T, K, N, R, F);
        printf("T %d, isa \"%s\", %d threads: status %d, error %.2g\n", static_cast<int>(T), isa, threads, status,
               error);
        passed = passed && error < 2e-6;
      }
    }
  }
  printf(passed ? "all passed\n" : "failed\n");
  return passed ? 0 : 1;
}
