// Prints the logits of a model at every token, as raw float32: logits MODEL N_CTX N_THREADS < token ids as text.
#include "llama.h"

#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <vector>

int main(int argc, char ** argv) {
    if (argc != 4) { return 2; }
    std::vector<llama_token> tokens;
    for (llama_token token; std::cin >> token;) { tokens.push_back(token); }
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
#ifdef BACKENDS // a folder, for trees whose CPU backend is loaded at run time
    ggml_backend_load_all_from_path(BACKENDS);
#endif
    llama_backend_init();
    llama_context_params params = llama_context_default_params();
    params.n_ctx = params.n_batch = static_cast<uint32_t>(atoi(argv[2]));
    params.n_ubatch = 512;
    params.n_threads = params.n_threads_batch = atoi(argv[3]);
    llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    llama_context * ctx = model ? llama_init_from_model(model, params) : nullptr;
    const int n_vocab = ctx ? llama_vocab_n_tokens(llama_model_get_vocab(model)) : 0;
    if (!ctx) { return 1; }
    llama_batch batch = llama_batch_init(static_cast<int32_t>(tokens.size()), 0, 1);
    batch.n_tokens = static_cast<int32_t>(tokens.size());
    for (int i = 0; i < batch.n_tokens; i++) {
        batch.token[i] = tokens[static_cast<size_t>(i)];
        batch.pos[i] = i;
        batch.n_seq_id[i] = 1;
        batch.seq_id[i][0] = 0;
        batch.logits[i] = true;
    }
    if (llama_decode(ctx, batch) != 0) { return 1; }
    const size_t n = tokens.size() * static_cast<size_t>(n_vocab);
    return fwrite(llama_get_logits(ctx), sizeof(float), n, stdout) == n ? 0 : 1;
}
