// An exported encoder in C++, and its adapters:
//
//   encoder MODEL.onnx [ADAPTER.onnx_adapter ...] < ids.txt
//
// Each line of the input has the token ids of one text. Prints the model's first output, a line of numbers a text:
// without an adapter what the model computes by itself, then a block for each adapter, headed by its path.
#include <loratrf.h>
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

namespace {

// The texts of a batch, padded to the longest.
struct Batch {
  int64_t rows = 0, columns = 0;
  std::vector<int64_t> ids, mask, types;
};

Batch ReadIds(std::istream& in) {
  std::vector<std::vector<int64_t>> texts;
  for (std::string line; std::getline(in, line);) {
    std::istringstream numbers(line);
    std::vector<int64_t> text;
    for (int64_t id; numbers >> id;) text.push_back(id);
    if (!numbers.eof()) throw std::runtime_error("line " + std::to_string(texts.size() + 1) + " is not token ids");
    if (!text.empty()) texts.push_back(std::move(text));
  }
  if (texts.empty()) throw std::runtime_error("no token ids on stdin: a line of numbers for each text is expected");
  Batch batch;
  batch.rows = static_cast<int64_t>(texts.size());
  for (const auto& text : texts) batch.columns = std::max(batch.columns, static_cast<int64_t>(text.size()));
  for (const auto& text : texts) {
    for (int64_t i = 0; i < batch.columns; ++i) {
      const bool is_token = i < static_cast<int64_t>(text.size());
      batch.ids.push_back(is_token ? text[static_cast<size_t>(i)] : 0);
      batch.mask.push_back(is_token);
    }
  }
  batch.types.assign(batch.ids.size(), 0);
  return batch;
}

// Runs `session`, under what `options` has active, and prints its first output.
void Run(Ort::Session& session, const Ort::RunOptions& options, Batch& batch) {
  const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  const int64_t shape[] = {batch.rows, batch.columns};
  Ort::AllocatorWithDefaultOptions allocator;
  std::vector<std::string> names;
  std::vector<Ort::Value> values;
  for (size_t i = 0; i < session.GetInputCount(); ++i) {
    const std::string name = session.GetInputNameAllocated(i, allocator).get();
    auto* data = name == "input_ids" ? &batch.ids : name == "attention_mask" ? &batch.mask : &batch.types;
    if (data == &batch.types && name != "token_type_ids") continue;  // an adapter's weight
    names.push_back(name);
    values.push_back(Ort::Value::CreateTensor<int64_t>(memory, data->data(), data->size(), shape, 2));
  }
  std::vector<const char*> inputs;
  for (const std::string& name : names) inputs.push_back(name.c_str());
  const std::string output = session.GetOutputNameAllocated(0, allocator).get();
  const char* const outputs[] = {output.c_str()};
  const auto results = session.Run(options, inputs.data(), values.data(), values.size(), outputs, 1);
  const size_t count = results[0].GetTensorTypeAndShapeInfo().GetElementCount();
  const float* numbers = results[0].GetTensorData<float>();
  const size_t width = count / static_cast<size_t>(batch.rows);
  for (size_t i = 0; i < count; ++i) std::printf("%.9g%c", numbers[i], i % width == width - 1 ? '\n' : ' ');
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc < 2) throw std::runtime_error("usage: encoder MODEL.onnx [ADAPTER.onnx_adapter ...] < ids.txt");
  const std::string model = argv[1];
  if (!std::ifstream(model)) throw std::runtime_error("no model at " + model);
  if (!std::ifstream(model + ".data")) {
    throw std::runtime_error(model + ".data, the model's weights, is missing: keep the files of an export together");
  }
  Batch batch = ReadIds(std::cin);
  Ort::Env env(ORT_LOGGING_LEVEL_ERROR, "encoder");  // each weight with a default would be a warning
  Ort::SessionOptions options;
  // Our kernels; without this line the same file runs, by the operators' definitions in it.
  Ort::ThrowOnError(RegisterCustomOps(options, OrtGetApiBase()));
  Ort::Session session(env, model.c_str(), options);
  Run(session, Ort::RunOptions(), batch);
  for (int i = 2; i < argc; ++i) {
    std::printf("%s\n", argv[i]);
    // No allocator: the weights stay in the CPU's memory.
    const auto adapter = Ort::LoraAdapter::CreateLoraAdapter(argv[i], nullptr);
    Ort::RunOptions with;
    with.AddActiveLoraAdapter(adapter);
    Run(session, with, batch);
  }
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "error: %s\n", error.what());
  return 1;
}
