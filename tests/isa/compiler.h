/* Whether the compiler, with the library's flags, keeps the stores that a called function makes. */

/* False with GCC 11 and 12 on aarch64 without -fno-ipa-modref. */
int compiler_keeps_stores(void);
