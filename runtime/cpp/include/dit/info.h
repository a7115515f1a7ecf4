/* What a bundle draws and what it takes. Included by dit.h. Its strings are the bundle's: escape them before you print
 * them. */
#ifndef DIT_INFO_H
#define DIT_INFO_H

typedef struct dit_info {
    size_t struct_size;
    int64_t num_classes;      /* labels are 0 to num_classes - 1; 0 where the network takes none */
    int has_labels;           /* whether classes have names */
    int64_t latent_shape[3];  /* channels, height, width; all 0 where the state has another rank than 3 */
    int64_t image_shape[3];   /* height, width, 3; all 0 without a decoder */
    int64_t max_batch;        /* what the denoiser takes at a time; longer requests are split */
    int64_t train_steps;      /* the most steps of a run */
    const char* model;        /* its name, such as "XL/2" */
    const char* solver;       /* the bundle's default */
    const char* backend;      /* that the denoiser runs on here */
    const char* precision;    /* of the denoiser */
    int64_t caption_shape[2]; /* of the port "captions": the most tokens, and numbers a token; both 0 without it */
    int state_rank;           /* of what a run changes, such as latents */
    int64_t state_shape[8];   /* its sizes, channels first */
    const char* note;         /* a warning for people where a graph does not compute here in its precision; else "" */
    int batch_invariant; /* 1: the build saw on these engines, on a CPU, that a sample has the same bits in each batch;
                            0: it differs, or was not measured */
    int64_t steps;       /* the bundle's default */
    double guidance;     /* the bundle's default */
    const char* guidance_port; /* the port that takes the weight of a network which is guided by itself; a request
                                  leaves it out, and has no negative. "": guidance leads away from a negative */
    size_t num_sizes;          /* that the bundle draws: dit_model_size */
    size_t num_ports;          /* that condition the network: dit_model_port */
    size_t num_prompts;        /* tokenizers that a prompt goes through: dit_model_prompt; 0 without text encoders */
    size_t num_presets;        /* dit_model_preset */
    int64_t frames;            /* of a video; 0 where the bundle draws pictures, and without a decoder */
} dit_info;

#define DIT_INFO_INIT                                                                                     \
    {sizeof(dit_info),         0,    0, {0, 0, 0}, {0, 0, 0}, 0,    0, NULL, NULL, NULL, NULL, {0, 0}, 0, \
     {0, 0, 0, 0, 0, 0, 0, 0}, NULL, 0, 0,         0.0,       NULL, 0, 0,    0,    0,    0}

/* A size of the pictures that the bundle draws. dit_info has the shapes of the one that requests without a size draw.
 */
typedef struct dit_size {
    size_t struct_size;
    const char* name;       /* "512", or "512x768" for height x width; "": the bundle has one, without a name */
    int state_rank;         /* of what a run changes */
    int64_t state_shape[8]; /* its sizes, channels first */
    int64_t image_shape[3]; /* height, width, 3; all 0 without a decoder */
    int64_t frames;         /* of a video; 0 where the bundle draws pictures, and without a decoder */
} dit_size;

#define DIT_SIZE_INIT {sizeof(dit_size), NULL, 0, {0, 0, 0, 0, 0, 0, 0, 0}, {0, 0, 0}, 0}

typedef enum dit_dtype { DIT_FLOAT32 = 0, DIT_INT64 = 1 } dit_dtype;

/* An input that conditions the network: labels, prompt embeddings, masks, sizes, … */
typedef struct dit_port {
    size_t struct_size;
    const char* name;
    dit_dtype dtype;
    int rank;          /* of a row */
    int64_t shape[8];  /* of a row: the first size is the most tokens where a mask marks them */
    int64_t size;      /* of DIT_INT64: values are 0 to size - 1 */
    const char* masks; /* the port whose tokens this one marks with 1 or 0; "" where it is no mask */
    int has_null;      /* whether guidance leads away from a constant, so that a negative is not needed */
} dit_port;

#define DIT_PORT_INIT {sizeof(dit_port), NULL, DIT_FLOAT32, 0, {0, 0, 0, 0, 0, 0, 0, 0}, 0, NULL, 0}

/* What a prompt becomes with one tokenizer. A bundle with text encoders takes these arrays in the place of the ports
 * that the encoders give. libdit has no tokenizer: put the words into the template and tokenize them elsewhere. */
typedef struct dit_prompt {
    size_t struct_size;
    const char* ids;  /* the array of token ids, int64 [rows, tokens] */
    const char* mask; /* the array that is 1 for each token of the prompt, else 0, int64 [rows, tokens]; "": none */
    int64_t tokens;
    int64_t size;                  /* ids are 0 to size - 1 */
    const char* tokenizer;         /* a file of the bundle: a tokenizer.json that truncates and pads to `tokens` */
    const char* prompt_template;   /* the words stand where it has {} */
    const char* negative_template; /* the same for negative prompts, of which the usual one is "" */
    int lowercase;                 /* 1: the words are lowered and stripped before, as str.lower and str.strip do */
} dit_prompt;

#define DIT_PROMPT_INIT {sizeof(dit_prompt), NULL, NULL, 0, 0, NULL, NULL, NULL, 0}

/* Each of these may be called from any thread, at any time, and returns at once. Strings belong to the model. An index
 * or a label that is not there is refused: DIT_BAD_ARGUMENT, or NULL. */

DIT_API dit_status dit_model_info(const dit_model* model, dit_info* info);

/* The sizes from 0, which requests without a size draw, to dit_info.num_sizes - 1. */
DIT_API dit_status dit_model_size(const dit_model* model, size_t index, dit_size* size);

/* The ports from 0 to dit_info.num_ports - 1. */
DIT_API dit_status dit_model_port(const dit_model* model, size_t index, dit_port* port);

/* The prompts from 0 to dit_info.num_prompts - 1. */
DIT_API dit_status dit_model_prompt(const dit_model* model, size_t index, dit_prompt* prompt);

/* The name of a preset, from 0 to dit_info.num_presets - 1; NULL where there is none. */
DIT_API const char* dit_model_preset(const dit_model* model, size_t index);

/* The name of a class; NULL where there is none. */
DIT_API const char* dit_model_label(const dit_model* model, int64_t label);

/* The class of a name, one of its synonyms, or a number as text. */
DIT_API dit_status dit_model_find_label(const dit_model* model, const char* name, int64_t* label);

#endif /* DIT_INFO_H */
