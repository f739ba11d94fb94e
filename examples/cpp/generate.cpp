// A language model of loratrf-export in C++, by onnxruntime-genai's C API, and one of its adapters:
//
//   generate FOLDER PROMPT [ADAPTER.onnx_adapter] [TOKENS]
//
// Prints the new text. FOLDER holds genai_config.json; with --bundle-library in its export our kernels run, else the
// operators' definitions.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>

#if __has_include(<ort_genai_c.h>)
#include <ort_genai_c.h>
#else  // the wheel has no headers: what is used here of version 0.18
extern "C" {
struct OgaResult;
struct OgaModel;
struct OgaTokenizer;
struct OgaTokenizerStream;
struct OgaSequences;
struct OgaGeneratorParams;
struct OgaGenerator;
struct OgaAdapters;
const char* OgaResultGetError(const OgaResult*);
void OgaDestroyResult(OgaResult*);
OgaResult* OgaCreateModel(const char*, OgaModel**);
OgaResult* OgaCreateTokenizer(const OgaModel*, OgaTokenizer**);
OgaResult* OgaCreateTokenizerStream(const OgaTokenizer*, OgaTokenizerStream**);
OgaResult* OgaTokenizerStreamDecode(OgaTokenizerStream*, int32_t, const char**);
OgaResult* OgaCreateSequences(OgaSequences**);
OgaResult* OgaTokenizerEncode(const OgaTokenizer*, const char*, OgaSequences*);
size_t OgaSequencesGetSequenceCount(const OgaSequences*, size_t);
OgaResult* OgaCreateGeneratorParams(const OgaModel*, OgaGeneratorParams**);
OgaResult* OgaGeneratorParamsSetSearchNumber(OgaGeneratorParams*, const char*, double);
OgaResult* OgaCreateAdapters(const OgaModel*, OgaAdapters**);
OgaResult* OgaLoadAdapter(OgaAdapters*, const char*, const char*);
OgaResult* OgaCreateGenerator(const OgaModel*, const OgaGeneratorParams*, OgaGenerator**);
OgaResult* OgaSetActiveAdapter(OgaGenerator*, OgaAdapters*, const char*);
OgaResult* OgaGenerator_AppendTokenSequences(OgaGenerator*, const OgaSequences*);
bool OgaGenerator_IsDone(OgaGenerator*);
OgaResult* OgaGenerator_GenerateNextToken(OgaGenerator*);
OgaResult* OgaGenerator_GetNextTokens(const OgaGenerator*, const int32_t**, size_t*);
void OgaDestroyModel(OgaModel*);
void OgaDestroyTokenizer(OgaTokenizer*);
void OgaDestroyTokenizerStream(OgaTokenizerStream*);
void OgaDestroySequences(OgaSequences*);
void OgaDestroyGeneratorParams(OgaGeneratorParams*);
void OgaDestroyGenerator(OgaGenerator*);
void OgaDestroyAdapters(OgaAdapters*);
void OgaShutdown();
}
#endif

namespace {

void Check(OgaResult* result) {
  if (!result) return;
  const std::string what = OgaResultGetError(result);
  OgaDestroyResult(result);
  throw std::runtime_error(what);
}

// What `create(..., &made)` made, destroyed in its time.
template <class T, class Create, class... Arguments>
auto Made(void (*destroy)(T*), Create create, Arguments... arguments) {
  T* made = nullptr;
  Check(create(arguments..., &made));
  return std::unique_ptr<T, void (*)(T*)>(made, destroy);
}

void Generate(int argc, char** argv) {
  const auto model = Made(OgaDestroyModel, OgaCreateModel, argv[1]);
  const auto tokenizer = Made(OgaDestroyTokenizer, OgaCreateTokenizer, model.get());
  const auto words = Made(OgaDestroyTokenizerStream, OgaCreateTokenizerStream, tokenizer.get());
  const auto prompt = Made(OgaDestroySequences, OgaCreateSequences);
  Check(OgaTokenizerEncode(tokenizer.get(), argv[2], prompt.get()));

  const double tokens = argc > 4 ? std::atoi(argv[4]) : 64;
  const auto parameters = Made(OgaDestroyGeneratorParams, OgaCreateGeneratorParams, model.get());
  const double length = static_cast<double>(OgaSequencesGetSequenceCount(prompt.get(), 0)) + tokens;
  Check(OgaGeneratorParamsSetSearchNumber(parameters.get(), "max_length", length));

  // Adapters outlive the generators that use them.
  const auto adapters = Made(OgaDestroyAdapters, OgaCreateAdapters, model.get());
  const auto generator = Made(OgaDestroyGenerator, OgaCreateGenerator, model.get(), parameters.get());
  if (argc > 3 && *argv[3]) {
    Check(OgaLoadAdapter(adapters.get(), argv[3], "adapter"));
    Check(OgaSetActiveAdapter(generator.get(), adapters.get(), "adapter"));  // before the prompt
  }
  Check(OgaGenerator_AppendTokenSequences(generator.get(), prompt.get()));
  while (!OgaGenerator_IsDone(generator.get())) {
    Check(OgaGenerator_GenerateNextToken(generator.get()));
    const int32_t* next = nullptr;
    size_t count = 0;
    Check(OgaGenerator_GetNextTokens(generator.get(), &next, &count));
    const char* piece = nullptr;
    Check(OgaTokenizerStreamDecode(words.get(), next[0], &piece));
    std::fputs(piece, stdout);
    std::fflush(stdout);
  }
  std::puts("");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    std::fprintf(stderr, "error: usage: generate FOLDER PROMPT [ADAPTER.onnx_adapter] [TOKENS]\n");
    return 1;
  }
  int code = 0;
  try {
    Generate(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    code = 1;
  }
  OgaShutdown();
  return code;
}
