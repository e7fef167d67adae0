/* A tool with ggml's shared libraries linked in that loads no backend itself: only LD_PRELOAD reaches it. */
#include <stdio.h>

const char * ggml_type_name(int type);
void * ggml_backend_dev_by_type(int type);
void * ggml_backend_dev_init(void * device, const char * params);
void ggml_backend_free(void * backend);

int main(void) {
    void * backend = ggml_backend_dev_init(ggml_backend_dev_by_type(0), NULL);
    printf("%s\n", ggml_type_name(36));
    ggml_backend_free(backend);
    return 0;
}
