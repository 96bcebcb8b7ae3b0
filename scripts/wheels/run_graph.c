/* Computes a graph on Windows with onnxruntime and a library of kernels:
 *
 *     run_graph onnxruntime.dll kernels.dll|- model.onnx inputs outputs
 *
 * inputs: a count, and of each tensor the length of its name, the name, ONNX's type and the rank (32 bits each), the
 * shape and the number of bytes (64 bits each), the bytes. outputs: the bytes of all outputs, in the graph's order.
 * Paths are ASCII.
 */

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <windows.h>

#include "onnxruntime_c_api.h"

#define MOST 512
#define MOST_RANK 8

static const OrtApi *api;

static void check(OrtStatus *status)
{
    if (status == NULL)
        return;
    fprintf(stderr, "%s\n", api->GetErrorMessage(status));
    exit(1);
}

static void require(int holds, const char *what)
{
    if (holds)
        return;
    fprintf(stderr, "%s (%lu)\n", what, GetLastError());
    exit(1);
}

static void take(FILE *file, void *to, size_t bytes)
{
    require(fread(to, 1, bytes, file) == bytes, "the inputs end early");
}

static const wchar_t *wide(const char *text)
{
    wchar_t *made = calloc(strlen(text) + 1, sizeof *made);
    for (size_t i = 0; text[i] != 0; i++)
        made[i] = (unsigned char)text[i];
    return made;
}

static OrtSession *open_graph(const char *kernels, const char *graph)
{
    OrtEnv *environment;
    OrtSessionOptions *options;
    OrtSession *session;
    check(api->CreateEnv(ORT_LOGGING_LEVEL_ERROR, "run_graph", &environment));
    check(api->CreateSessionOptions(&options));
    check(api->SetIntraOpNumThreads(options, 1));
    if (strcmp(kernels, "-") != 0) {
        check(api->AddSessionConfigEntry(options, "edgelm.threads", "2"));
        check(api->AddSessionConfigEntry(options, "edgelm.own_threads", "1"));
        check(api->RegisterCustomOpsLibrary_V2(options, wide(kernels)));
    }
    check(api->CreateSession(environment, wide(graph), options, &session));
    return session;
}

static OrtValue *read_tensor(FILE *file, char **name)
{
    int32_t length, type, rank;
    int64_t shape[MOST_RANK], bytes;
    OrtMemoryInfo *memory;
    OrtValue *value;
    take(file, &length, sizeof length);
    *name = calloc(length + 1, 1);
    take(file, *name, length);
    take(file, &type, sizeof type);
    take(file, &rank, sizeof rank);
    require(rank <= MOST_RANK, "a tensor has too many axes");
    take(file, shape, rank * sizeof *shape);
    take(file, &bytes, sizeof bytes);
    void *data = malloc(bytes + 1);
    take(file, data, bytes);
    check(api->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory));
    check(api->CreateTensorWithDataAsOrtValue(memory, data, bytes, shape, rank, type, &value));
    return value;
}

static size_t bytes_of(OrtValue *value)
{
    OrtTensorTypeAndShapeInfo *info;
    enum ONNXTensorElementDataType type;
    size_t count;
    check(api->GetTensorTypeAndShape(value, &info));
    check(api->GetTensorElementType(info, &type));
    check(api->GetTensorShapeElementCount(info, &count));
    switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT:
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32:
        return 4 * count;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64:
        return 8 * count;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8:
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8:
        return count;
    default:
        require(0, "an output has a type that is not known here");
        return 0;
    }
}

int main(int count, char **words)
{
    require(count == 6, "run_graph onnxruntime.dll kernels.dll|- model.onnx inputs outputs");
    HMODULE library = LoadLibraryA(words[1]);
    require(library != NULL, "onnxruntime cannot be loaded");
    typedef const OrtApiBase *(ORT_API_CALL * Base)(void);
    Base base = (Base)(void *)GetProcAddress(library, "OrtGetApiBase");
    require(base != NULL, "this is no onnxruntime");
    api = base()->GetApi(21);
    require(api != NULL, "onnxruntime is too old");
    OrtSession *session = open_graph(words[2], words[3]);

    FILE *file = fopen(words[4], "rb");
    require(file != NULL, "there are no inputs");
    int32_t inputs;
    take(file, &inputs, sizeof inputs);
    require(inputs <= MOST, "there are too many inputs");
    char *input_names[MOST], *output_names[MOST];
    OrtValue *given[MOST], *made[MOST] = {NULL};
    for (int i = 0; i < inputs; i++)
        given[i] = read_tensor(file, &input_names[i]);

    OrtAllocator *allocator;
    size_t outputs;
    check(api->GetAllocatorWithDefaultOptions(&allocator));
    check(api->SessionGetOutputCount(session, &outputs));
    require(outputs <= MOST, "there are too many outputs");
    for (size_t i = 0; i < outputs; i++)
        check(api->SessionGetOutputName(session, i, allocator, &output_names[i]));
    check(api->Run(session, NULL, (const char *const *)input_names, (const OrtValue *const *)given, inputs,
                   (const char *const *)output_names, outputs, made));

    FILE *out = fopen(words[5], "wb");
    require(out != NULL, "the outputs cannot be written");
    for (size_t i = 0; i < outputs; i++) {
        void *data;
        size_t bytes = bytes_of(made[i]);
        check(api->GetTensorMutableData(made[i], &data));
        require(fwrite(data, 1, bytes, out) == bytes, "the outputs cannot be written");
    }
    require(fclose(out) == 0, "the outputs cannot be written");
    return 0;
}
