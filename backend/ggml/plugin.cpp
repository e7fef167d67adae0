// libggml-ccq.so: the entry points, and the order in which a host is examined, patched, tested or let alone.
#include "elf.h"
#include "hooks.h"
#include "host.h"
#include "patch.h"
#include "selftest.h"
#include "types.h"

#include "../include/ccq.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <mutex>
#include <string>

#define CCQ_EXPORT extern "C" __attribute__((visibility("default")))

namespace ccq {

namespace {

// from_float stays empty in both tables: a weight's encoder needs the whole matrix and seconds, and no op that the
// hooked device accepts writes one of our types.
abi::type_traits traits_row(const TypeRow & type) {
    abi::type_traits row{};
    row.type_name = ccq_type(type.id)->name;
    row.blck_size = type.block_weights;
    row.type_size = static_cast<size_t>(type.block_bytes);
    row.is_quantized = true;
    row.to_float = type.to_float;
    return row;
}

abi::type_traits_cpu traits_cpu_row(const TypeRow & type) {
    abi::type_traits_cpu row{};
    row.vec_dot = type.vec_dot;
    row.vec_dot_type = abi::kTypeQ8_0;
    row.nrows = 1;
    return row;
}

// Never destroyed: the host may call in until its last thread is gone.
struct Plugin {
    std::mutex mutex;
    Host host;
    Patches patches;
    bool active = false;
    std::string error;
    abi::reg reg{};
};

Plugin & plugin() {
    static auto * instance = new Plugin;
    return *instance;
}

const char * reg_name(abi::reg *) {
    return "CCQ";
}
size_t reg_device_count(abi::reg *) {
    return 0;
} // ours is no device: the CPU's runs our types
abi::device * reg_device(abi::reg *, size_t) {
    return nullptr;
}
void * reg_proc_address(abi::reg *, const char *) {
    return nullptr;
}

void patch_tables(const Host & host, Patches & patches) {
    for (const TypeRow & type : kTypeRows) {
        if (abi::host_type(type.id) < 0) {
            continue;
        }
        patches.write(*host.get_type_traits(type.id), traits_row(type));
        patches.write(*host.get_type_traits_cpu(type.id), traits_cpu_row(type));
    }
}

void activate(Plugin & p, const void * caller) {
    const char * kernels = nullptr;
    if (const ccq_status status = ccq_isa(&kernels); status != CCQ_OK) {
        throw std::runtime_error(ccq_status_text(status)); // the user's setting, not the host
    }
    Host host;
    find_host(caller, host);
    p.host = host;
    patch_tables(p.host, p.patches);
    install_hooks(p.host, p.patches);
    self_test(p.host);
    p.reg = {p.host.api_version, {reg_name, reg_device_count, reg_device, reg_proc_address}, nullptr};
    p.active = true;
    p.error.clear();
    if (const char * quiet = getenv("CCQ_QUIET"); !quiet || strcmp(quiet, "1") != 0) {
        fprintf(stderr, "ccq: active in ggml %s (kernels: %s)\n", p.host.version.c_str(), kernels);
    }
}

abi::reg * refuse(Plugin & p, const std::string & reason) {
    p.patches.undo();
    p.error = reason;
    fprintf(stderr, "ccq: not active, nothing patched: %s\n", reason.c_str());
    return nullptr;
}

// The registry entry if the plugin is active afterwards; otherwise nothing is patched, and `error` says why.
abi::reg * start(const void * caller) {
    Plugin & p = plugin();
    const std::lock_guard lock(p.mutex);
    if (!p.active) {
        try {
            activate(p, caller);
        } catch (const Refusal & refusal) {
            return refuse(p, std::string(refusal.what()) +
                                 "; this llama.cpp needs the source integration (backend/ggml/README.md)");
        } catch (const std::exception & e) {
            return refuse(p, e.what());
        }
    } else if (!Library::of(reinterpret_cast<const void *>(p.host.dev_by_type)).contains(caller)) {
        p.error = "it is active in another copy of ggml in this process";
        fprintf(stderr, "ccq: not active here, nothing patched: %s\n", p.error.c_str());
        return nullptr;
    }
    return &p.reg;
}

bool is_preloaded() {
    Dl_info self;
    const char * preload = getenv("LD_PRELOAD");
    return preload && dladdr(reinterpret_cast<void *>(&is_preloaded), &self) && self.dli_fname &&
           strstr(preload, base_name(self.dli_fname).c_str());
}

// LD_PRELOAD reaches tools that have the CPU backend linked in and load no others.  A build whose backends are
// libraries of their own has no CPU device yet; it looks at GGML_BACKEND_PATH when it loads them.  A program without
// ggml (the shell that starts the tool, say) is let alone, silently.
__attribute__((constructor)) void on_load() {
    const void * registry = is_preloaded() ? global_registry() : nullptr;
    if (!registry) {
        return;
    }
    auto * dev_by_type = reinterpret_cast<abi::device * (*)(int)>(dlsym(RTLD_DEFAULT, "ggml_backend_dev_by_type"));
    if (dev_by_type && dev_by_type(abi::kDeviceTypeCpu)) {
        start(registry);
        return;
    }
    Dl_info self;
    if (dladdr(reinterpret_cast<void *>(&on_load), &self) && self.dli_fname) {
        setenv("GGML_BACKEND_PATH", self.dli_fname, 0);
    }
}

} // namespace

} // namespace ccq

// Called by ggml_backend_load: the return address tells which of several mapped ggml copies that was.
CCQ_EXPORT ccq::abi::reg * ggml_backend_init() {
    return ccq::start(__builtin_return_address(0));
}

// Why the last attempt was refused; "" if it was not.  Valid until the next attempt.
CCQ_EXPORT const char * ccq_plugin_error() {
    auto & p = ccq::plugin();
    const std::lock_guard lock(p.mutex);
    return p.error.c_str();
}
