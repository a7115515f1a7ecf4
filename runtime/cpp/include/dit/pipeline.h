/* A handle that is made before its bundle is opened. Included by dit.h. Each of these is a call on the pipeline's
 * model, and any thread may make it at any time before dit_free. Without a bundle it gives DIT_BAD_ARGUMENT, 0 or NULL.
 */
#ifndef DIT_PIPELINE_H
#define DIT_PIPELINE_H

/* A pipeline without a bundle; NULL where memory is short. */
DIT_API dit_pipeline* dit_new(void);

/* Must be the last call on the pipeline; NULL is fine. */
DIT_API void dit_free(dit_pipeline* pipe);

/* A pipeline opens one bundle; after a failure it may open another. */
DIT_API dit_status dit_open(dit_pipeline* pipe, const char* bundle, const dit_open_options* options);

/* The pipeline's model, which stays the pipeline's; NULL without a bundle. */
DIT_API dit_model* dit_get_model(const dit_pipeline* pipe);

DIT_API dit_status dit_get_info(dit_pipeline* pipe, dit_info* info);
DIT_API size_t dit_size_count(const dit_pipeline* pipe);
DIT_API dit_status dit_get_size(dit_pipeline* pipe, size_t index, dit_size* size);
DIT_API size_t dit_port_count(const dit_pipeline* pipe);
DIT_API dit_status dit_get_port(dit_pipeline* pipe, size_t index, dit_port* port);
DIT_API size_t dit_prompt_count(const dit_pipeline* pipe);
DIT_API dit_status dit_get_prompt(dit_pipeline* pipe, size_t index, dit_prompt* prompt);
DIT_API const char* dit_preset(const dit_pipeline* pipe, size_t index);
DIT_API const char* dit_label(const dit_pipeline* pipe, int64_t label);
DIT_API dit_status dit_find_label(dit_pipeline* pipe, const char* name, int64_t* label);

DIT_API dit_status dit_generate(dit_pipeline* pipe, const dit_request* request, uint8_t* pixels, size_t size);

DIT_API dit_status dit_generate_latents(dit_pipeline* pipe, const dit_request* request, float* latents, size_t size);

/* dit_run_begin; the run may outlive the pipeline. */
DIT_API dit_status dit_run_new(dit_pipeline* pipe, const dit_request* request, dit_run** run);

DIT_API dit_status dit_verify(dit_pipeline* pipe, dit_on_check on_check, void* user);

/* dit_last_message. */
DIT_API const char* dit_message(const dit_pipeline* pipe);

#endif /* DIT_PIPELINE_H */
