/* Class and probabilities of encoded photos, by a published SavedModel, without Python.
 *
 *     predict MODEL_DIR FILE...
 *
 * MODEL_DIR is a folder saved_model of a published run; each FILE is a JPEG, PNG, GIF or BMP of any size. For each file
 * one line goes to standard output, with tabs between its fields: file, class name, and the probability of each class,
 * in the order of dataset.classes in the run's manifest.json.
 *
 * Exit code: 0 if all files were classified, 1 if some could not be (the others are), 2 if none can be: wrong
 * arguments, no such model, or another one. Messages go to standard error.
 *
 * C11 and TensorFlow's C API, tried with TensorFlow 2.18 and 2.21. README.md beside this file says how to compile it.
 */
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <tensorflow/c/c_api.h>

#define SIGNATURE "serving_default"

enum { BATCH = 32, ALL_DONE = 0, SOME_FAILED = 1, UNUSABLE = 2 };

static void out_of_memory(void) {
  fputs("predict: out of memory\n", stderr);
  exit(UNUSABLE);
}

/* ---- The names of a signature's tensors, out of a serialized MetaGraphDef -------------------------------------------
 *
 * They are TensorFlow's own (such as StatefulPartitionedCall_1:2) and may change with its version, so they are looked
 * up. Of protobuf's wire format that takes: fields, and maps from strings to messages
 * (protobuf.dev/programming-guides/encoding). Field numbers are those of tensorflow/core/protobuf/meta_graph.proto. */

typedef struct {
  const unsigned char *at;
  size_t left;
} Bytes;

enum { META_GRAPH_SIGNATURES = 5, SIGNATURE_INPUTS = 1, SIGNATURE_OUTPUTS = 2, TENSOR_INFO_NAME = 1 };
enum { MAP_KEY = 1, MAP_VALUE = 2 };
enum { VARINT = 0, FIXED_64 = 1, LENGTH_DELIMITED = 2, FIXED_32 = 5 };

/* Take a varint off the front; 0 where it is cut short or longer than 64 bits. */
static int take_varint(Bytes *bytes, uint64_t *value) {
  *value = 0;
  for (unsigned shift = 0; shift < 64 && bytes->left > 0; shift += 7) {
    const unsigned char byte = *bytes->at++;
    bytes->left--;
    *value |= (uint64_t)(byte & 0x7f) << shift;
    if (byte < 0x80) return 1;
  }
  return 0;
}

/* Take a field off the front: its number, and its content if that has a length. 0 at the end, -1 if it is damaged. */
static int take_field(Bytes *bytes, uint64_t *number, Bytes *content) {
  uint64_t tag, length = 0;
  if (bytes->left == 0) return 0;
  if (!take_varint(bytes, &tag)) return -1;
  *number = tag >> 3;
  *content = (Bytes){NULL, 0};
  switch (tag & 7) {
    case VARINT:
      return take_varint(bytes, &length) ? 1 : -1;
    case FIXED_64:
      length = 8;
      break;
    case LENGTH_DELIMITED:
      if (!take_varint(bytes, &length)) return -1;
      break;
    case FIXED_32:
      length = 4;
      break;
    default:
      return -1;
  }
  if (length > bytes->left) return -1;
  if ((tag & 7) == LENGTH_DELIMITED) *content = (Bytes){bytes->at, (size_t)length};
  bytes->at += length;
  bytes->left -= (size_t)length;
  return 1;
}

/* Find a field by its number; 0 if there is none or the message is damaged. */
static int find_field(Bytes message, uint64_t wanted, Bytes *found) {
  uint64_t number;
  Bytes content;
  int state, there = 0;
  while ((state = take_field(&message, &number, &content)) > 0) {
    if (number == wanted && content.at != NULL) {
      *found = content;
      there = 1;
    }
  }
  return state == 0 && there;
}

/* Find the value of a key in the map that is the field of this number; 0 if there is none or the map is damaged. */
static int find_in_map(Bytes message, uint64_t map, const char *key, Bytes *found) {
  uint64_t number;
  Bytes entry, name = {NULL, 0}, value;
  int state, there = 0;
  while ((state = take_field(&message, &number, &entry)) > 0) {
    if (number != map || entry.at == NULL || !find_field(entry, MAP_KEY, &name)) continue;
    if (name.left != strlen(key) || memcmp(name.at, key, name.left) != 0) continue;
    if (find_field(entry, MAP_VALUE, &value)) {
      *found = value;
      there = 1;
    }
  }
  return state == 0 && there;
}

/* Set the graph's output that the signature calls ``key``; 0 if there is none. */
static int find_tensor(TF_Graph *graph, Bytes signature, uint64_t map, const char *key, TF_Output *tensor) {
  Bytes info, name;
  if (!find_in_map(signature, map, key, &info) || !find_field(info, TENSOR_INFO_NAME, &name)) return 0;
  char *operation = malloc(name.left + 1);
  if (operation == NULL) out_of_memory();
  memcpy(operation, name.at, name.left);
  operation[name.left] = '\0';
  char *colon = strrchr(operation, ':');
  tensor->index = colon == NULL ? 0 : atoi(colon + 1);
  if (colon != NULL) *colon = '\0';
  tensor->oper = TF_GraphOperationByName(graph, operation);
  free(operation);
  return tensor->oper != NULL && tensor->index >= 0 && tensor->index < TF_OperationNumOutputs(tensor->oper);
}

/* ---- The model ------------------------------------------------------------------------------------------------- */

enum { PROBABILITIES, CLASS_NAME, OUTPUTS };

typedef struct {
  TF_Session *session;
  TF_Graph *graph;
  TF_Output image_bytes;
  TF_Output outputs[OUTPUTS];
} Model;

/* Set the model's tensors as its signature in the serialized MetaGraphDef names them; 0 if one is not there. */
static int find_tensors(Model *model, Bytes meta_graph) {
  TF_Graph *graph = model->graph;
  TF_Output *outputs = model->outputs;
  Bytes signature;
  return find_in_map(meta_graph, META_GRAPH_SIGNATURES, SIGNATURE, &signature) &&
         find_tensor(graph, signature, SIGNATURE_INPUTS, "image_bytes", &model->image_bytes) &&
         find_tensor(graph, signature, SIGNATURE_OUTPUTS, "probabilities", &outputs[PROBABILITIES]) &&
         find_tensor(graph, signature, SIGNATURE_OUTPUTS, "class_name", &outputs[CLASS_NAME]);
}

/* Load the model and find its tensors; 0, and what was wrong on standard error, if that cannot be done. */
static int load(const char *folder, Model *model, TF_Status *status) {
  static const char *const tags[] = {"serve"};
  TF_SessionOptions *options = TF_NewSessionOptions();
  TF_Buffer *meta_graph = TF_NewBuffer();
  int loaded = 0;
  model->graph = TF_NewGraph();
  model->session = TF_LoadSessionFromSavedModel(options, NULL, folder, tags, 1, model->graph, meta_graph, status);
  if (TF_GetCode(status) != TF_OK) {
    fprintf(stderr, "predict: %s: cannot be loaded: %s\n", folder, TF_Message(status));
    fputs("predict: MODEL_DIR is a folder saved_model of a published run.\n", stderr);
  } else if (!find_tensors(model, (Bytes){meta_graph->data, meta_graph->length})) {
    fprintf(stderr,
            "predict: %s: is another kind of model: it has no signature %s that takes image_bytes and returns "
            "probabilities and class_name. Try: saved_model_cli show --dir %s --all\n",
            folder, SIGNATURE, folder);
  } else {
    loaded = 1;
  }
  TF_DeleteBuffer(meta_graph);
  TF_DeleteSessionOptions(options);
  return loaded;
}

/* Return the bytes of a file, to be freed; NULL, and why on standard error, if it cannot be read. */
static char *read_file(const char *path, size_t *size) {
  size_t room = 1 << 16;
  FILE *file = fopen(path, "rb");
  char *bytes = file == NULL ? NULL : malloc(room);
  if (file == NULL) {
    fprintf(stderr, "predict: %s: cannot be read: %s\n", path, strerror(errno));
    return NULL;
  }
  *size = 0;
  while (bytes != NULL && (*size += fread(bytes + *size, 1, room - *size, file)) == room) {
    char *larger = realloc(bytes, room *= 2);
    if (larger == NULL) free(bytes);
    bytes = larger;
  }
  if (bytes == NULL) out_of_memory();
  if (ferror(file)) {
    fprintf(stderr, "predict: %s: cannot be read: %s\n", path, strerror(errno));
    free(bytes);
    bytes = NULL;
  }
  fclose(file);
  return bytes;
}

/* Run the model on encoded images [count]; the results are the caller's to delete. */
static int run(const Model *model, char *const images[], const size_t sizes[], int count, TF_Tensor *results[],
               TF_Status *status) {
  const int64_t shape[] = {count};
  TF_Tensor *input = TF_AllocateTensor(TF_STRING, shape, 1, (size_t)count * sizeof(TF_TString));
  if (input == NULL) out_of_memory();
  TF_TString *strings = TF_TensorData(input);
  for (int i = 0; i < count; i++) {
    TF_StringInit(&strings[i]);
    TF_StringCopy(&strings[i], images[i], sizes[i]);
  }
  TF_SessionRun(model->session, NULL, &model->image_bytes, &input, 1, model->outputs, results, OUTPUTS, NULL, 0, NULL,
                status);
  /* the tensor's memory is its own, what the strings point to is not */
  for (int i = 0; i < count; i++) TF_StringDealloc(&strings[i]);
  TF_DeleteTensor(input);
  return TF_GetCode(status) == TF_OK;
}

static int has_expected_form(TF_Tensor *const results[], int count) {
  const TF_Tensor *probabilities = results[PROBABILITIES], *names = results[CLASS_NAME];
  return TF_TensorType(probabilities) == TF_FLOAT && TF_NumDims(probabilities) == 2 &&
         TF_Dim(probabilities, 0) == count && TF_TensorType(names) == TF_STRING && TF_NumDims(names) == 1 &&
         TF_Dim(names, 0) == count;
}

/* Classify the images [count] and print a line for each; return how many could not be. */
static int classify(const Model *model, const char *const paths[], char *const images[], const size_t sizes[],
                    int count, TF_Status *status) {
  TF_Tensor *results[OUTPUTS] = {NULL, NULL};
  int failed = 0;
  if (run(model, images, sizes, count, results, status)) {
    if (!has_expected_form(results, count)) {
      fputs("predict: the model's answer is not float32 [batch, classes] and string [batch]\n", stderr);
      exit(UNUSABLE);
    }
    const float *probabilities = TF_TensorData(results[PROBABILITIES]);
    const TF_TString *names = TF_TensorData(results[CLASS_NAME]);
    const int classes = (int)TF_Dim(results[PROBABILITIES], 1);
    for (int i = 0; i < count; i++) {
      printf("%s\t%.*s", paths[i], (int)TF_StringGetSize(&names[i]), TF_StringGetDataPointer(&names[i]));
      /* nine digits give back the same float32 */
      for (int j = 0; j < classes; j++) printf("\t%.9g", (double)probabilities[i * classes + j]);
      putchar('\n');
    }
  } else if (count == 1) {
    const char *message = TF_Message(status);
    fprintf(stderr, "predict: %s: cannot be classified: %.*s\n", paths[0], (int)strcspn(message, "\n"), message);
    failed = 1;
  } else {
    /* one bad image fails its whole batch, and the message does not say which it was */
    for (int i = 0; i < count; i++) failed += classify(model, &paths[i], &images[i], &sizes[i], 1, status);
  }
  for (int i = 0; i < OUTPUTS; i++) {
    if (results[i] != NULL) TF_DeleteTensor(results[i]);
  }
  return failed;
}

int main(int argc, char *argv[]) {
  if (argc < 3) {
    fputs("usage: predict MODEL_DIR FILE...\n", stderr);
    return UNUSABLE;
  }
  TF_Status *status = TF_NewStatus();
  Model model;
  if (!load(argv[1], &model, status)) return UNUSABLE;
  int failed = 0;
  for (int next = 2; next < argc;) {
    const char *paths[BATCH];
    char *images[BATCH];
    size_t sizes[BATCH];
    int count = 0;
    for (; next < argc && count < BATCH; next++) {
      paths[count] = argv[next];
      images[count] = read_file(argv[next], &sizes[count]);
      if (images[count] == NULL) {
        failed++;
      } else {
        count++;
      }
    }
    if (count > 0) failed += classify(&model, paths, images, sizes, count, status);
    for (int i = 0; i < count; i++) free(images[i]);
  }
  TF_CloseSession(model.session, status);
  TF_DeleteSession(model.session, status);
  TF_DeleteGraph(model.graph);
  TF_DeleteStatus(status);
  if (fflush(stdout) != 0 || ferror(stdout)) {
    fprintf(stderr, "predict: standard output cannot be written: %s\n", strerror(errno));
    return UNUSABLE;
  }
  return failed == 0 ? ALL_DONE : SOME_FAILED;
}
