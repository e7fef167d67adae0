#include "host.h"

#include "elf.h"
#include "types.h"

#include <atomic>
#include <cstring>
#include <dlfcn.h>

namespace ccq {

namespace {

void require(bool ok, const std::string & what) {
    if (!ok) {
        throw Refusal("this ggml is laid out differently (" + what + ")");
    }
}

// --- which copy ---------------------------------------------------------------------------------------------------

// A libllama that resolves ggml to another copy would never see what is patched here.
void check_libllama(const Host & host) {
    int used = 0, other = 0;
    for_each_library([&](const Library & library) {
        if (base_name(library.path()).rfind("libllama.so", 0) == 0) {
            void * table = library.symbol("ggml_get_type_traits");
            (table == reinterpret_cast<void *>(host.get_type_traits) ? used : other)++;
        }
    });
    if (other && !used) {
        throw Refusal("libllama in this process uses another copy of ggml");
    }
}

void resolve(const void * caller, Host & host) {
    const Library registry = Library::of(caller);
    const void * load = registry.symbol("ggml_backend_load");
    if (!registry || !load || !registry.contains(load)) {
        if (registry.is_program()) {
            throw Refusal("ggml is linked into this program statically and exports no symbols");
        }
        throw Refusal("it was not loaded through ggml_backend_load of a ggml library");
    }
    const auto get = [&](const char * name) {
        void * symbol = registry.symbol(name);
        if (!symbol) {
            throw Refusal(std::string("this ggml has no function ") + name);
        }
        return symbol;
    };

    // The API version comes first: nothing else is read before it is known.
    host.dev_by_type = reinterpret_cast<decltype(host.dev_by_type)>(get("ggml_backend_dev_by_type"));
    host.dev_reg = reinterpret_cast<decltype(host.dev_reg)>(get("ggml_backend_dev_backend_reg"));
    host.cpu = host.dev_by_type(abi::kDeviceTypeCpu);
    if (!host.cpu) {
        throw Refusal("ggml has no CPU device yet");
    }
    const abi::reg * reg = host.dev_reg(host.cpu);
    host.api_version = reg ? reg->api_version : 0;
    if (host.api_version < abi::kApiVersionMin || host.api_version > abi::kApiVersionMax) {
        throw Refusal("ggml's backend API version is " + std::to_string(host.api_version) + ", not 2 or 3");
    }

#define X(result, member, symbol, parameters) host.member = reinterpret_cast<result(*) parameters>(get(#symbol));
    CCQ_HOST_FUNCTIONS(X)
#undef X
    void * version = registry.symbol("ggml_version");
    host.version = version ? reinterpret_cast<const char * (*)()>(version)() : "of unknown version";

    // The CPU backend may be a library of its own that nothing links to: its device leads to it.
    require(host.cpu->reg == reg, "struct ggml_backend_device");
    const Library cpu = Library::of(reinterpret_cast<const void *>(host.cpu->iface.get_name));
    void * traits_cpu = cpu.symbol("ggml_get_type_traits_cpu");
    if (!cpu || !traits_cpu || !cpu.contains(traits_cpu)) {
        throw Refusal("the library of ggml's CPU backend cannot be identified");
    }
    host.get_type_traits_cpu = reinterpret_cast<decltype(host.get_type_traits_cpu)>(traits_cpu);

    const auto base = reinterpret_cast<void *>(host.get_type_traits);
    void * global = dlsym(RTLD_DEFAULT, "ggml_get_type_traits");
    if (cpu.symbol("ggml_get_type_traits") != base || (global && global != base)) {
        throw Refusal("several copies of ggml are mixed in this process");
    }
    check_libllama(host);
}

// --- layouts ------------------------------------------------------------------------------------------------------

struct KnownType {
    int32_t id;
    const char * name;
    int64_t blck_size;
    size_t type_size;
};

// Rows around the eight that are filled; the last one lies beyond them.
constexpr KnownType kKnownTypes[] = {
    {abi::kTypeF32, "f32", 1, 4},
    {abi::kTypeF16, "f16", 1, 2},
    {2, "q4_0", 32, 18},
    {3, "q4_1", 32, 20},
    {6, "q5_0", 32, 22},
    {7, "q5_1", 32, 24},
    {abi::kTypeQ8_0, "q8_0", 32, 34},
    {10, "q2_K", 256, 84},
    {14, "q6_K", 256, 210},
    {20, "iq4_nl", 32, 18},
    {abi::kTypeI32, "i32", 1, 4},
    {abi::kTypeBF16, "bf16", 1, 2},
    {34, "tq1_0", 256, 54},
    {35, "tq2_0", 256, 66},
    {39, "mxfp4", 32, 17},
};

void check_type_tables(const Host & host) {
    const auto * rows = host.get_type_traits(0);
    const auto * rows_cpu = host.get_type_traits_cpu(0);
    require(host.get_type_traits(1) == rows + 1 && host.get_type_traits(39) == rows + 39, "stride of type_traits");
    require(host.get_type_traits_cpu(1) == rows_cpu + 1 && host.get_type_traits_cpu(39) == rows_cpu + 39,
            "stride of type_traits_cpu");
    for (const KnownType & known : kKnownTypes) {
        const auto & row = rows[known.id];
        const char * name = host.type_name(known.id);
        const bool float_or_int = known.blck_size == 1;
        require(name && strcmp(name, known.name) == 0 && host.blck_size(known.id) == known.blck_size &&
                    host.type_size(known.id) == known.type_size,
                std::string("type ") + known.name);
        require(row.type_name == name && row.blck_size == known.blck_size && row.type_size == known.type_size &&
                    row.is_quantized == !float_or_int && (float_or_int || row.to_float),
                std::string("row of ") + known.name);
    }
    require(rows_cpu[abi::kTypeQ8_0].vec_dot_type == abi::kTypeQ8_0 && rows_cpu[abi::kTypeQ8_0].from_float &&
                rows_cpu[abi::kTypeQ8_0].vec_dot && rows_cpu[2].vec_dot_type == abi::kTypeQ8_0 &&
                rows_cpu[1].vec_dot_type == 1 && rows_cpu[abi::kTypeF32].vec_dot_type == abi::kTypeF32,
            "type_traits_cpu");
    for (const TypeRow & type : kTypeRows) {
        if (abi::host_type(type.id) < 0) {
            continue;
        }
        const auto & row = rows[type.id];
        const auto & row_cpu = rows_cpu[type.id];
        if (row.type_name && strncmp(row.type_name, "ccq_", 4) == 0) {
            throw Refusal("another copy of this plugin is active in this ggml");
        }
        if (row.blck_size != 0 || row.type_size != 0 || row.to_float || row_cpu.from_float || row_cpu.vec_dot ||
            row_cpu.vec_dot_type != 0 || row_cpu.nrows != 0) {
            throw Refusal("this ggml uses type id " + std::to_string(type.id) + " (" +
                          (row.type_name ? row.type_name : "?") + ") itself");
        }
    }
}

struct ContextGuard {
    const Host & host;
    abi::context * ctx;
    ~ContextGuard() { host.free(ctx); }
};

void no_op(abi::tensor *, int, int, void *) {}

void check_tensor(Host & host, abi::context * ctx) {
    require(host.tensor_overhead() == 32 + sizeof(abi::tensor), "size of ggml_tensor");
    abi::tensor * t = host.new_tensor_4d(ctx, abi::kTypeF32, 128, 6, 4, 2);
    static constexpr int64_t ne[] = {128, 6, 4, 2};
    static constexpr size_t nb[] = {4, 512, 3072, 12288};
    host.set_name(t, "ccq check");
    require(t->type == abi::kTypeF32 && memcmp(t->ne, ne, sizeof ne) == 0 && memcmp(t->nb, nb, sizeof nb) == 0 &&
                strcmp(t->name, "ccq check") == 0 && !t->buffer && !t->data && !t->view_src && t->flags == 0,
            "fields of ggml_tensor");
    host.set_output(t);
    require(t->flags == 2, "flags of ggml_tensor");
    const abi::tensor * view = host.view_1d(ctx, t, 4, 16);
    require(view->view_src == t && view->view_offs == 16 && view->src[0] == t, "views of ggml_tensor");

    abi::tensor * x = host.new_tensor_4d(ctx, abi::kTypeF32, 128, 3, 4, 2);
    abi::tensor * experts = host.new_tensor_4d(ctx, abi::kTypeF32, 128, 6, 4, 1);
    abi::tensor * tokens = host.new_tensor_4d(ctx, abi::kTypeF32, 128, 1, 5, 1);
    abi::tensor * ids = host.new_tensor_4d(ctx, abi::kTypeI32, 2, 5, 1, 1);
    abi::tensor * table = host.new_tensor_4d(ctx, abi::kTypeF32, 128, 6, 1, 1);
    abi::tensor * rows = host.new_tensor_4d(ctx, abi::kTypeI32, 3, 1, 1, 1);
    const abi::tensor * a = host.mul_mat(ctx, t, x);
    const abi::tensor * b = host.mul_mat_id(ctx, experts, tokens, ids);
    const abi::tensor * c = host.get_rows(ctx, table, rows);
    require(a->src[0] == t && a->src[1] == x && host.classify(a->op) == OpClass::MulMat, "MUL_MAT");
    require(b->src[0] == experts && b->src[1] == tokens && b->src[2] == ids &&
                host.classify(b->op) == OpClass::MulMatId && b->ne[0] == 6 && b->ne[1] == 2 && b->ne[2] == 5,
            "MUL_MAT_ID");
    require(c->src[0] == table && c->src[1] == rows && host.classify(c->op) == OpClass::GetRows, "GET_ROWS");

    int tag = 0;
    abi::tensor * args[] = {t};
    const abi::tensor * custom = host.custom_4d(ctx, abi::kTypeF32, 1, 1, 1, 1, args, 1, no_op, abi::kAllTasks, &tag);
    abi::custom_op_params params;
    memcpy(&params, custom->op_params, sizeof params);
    require(params.fun == no_op && params.n_tasks == abi::kAllTasks && params.userdata == &tag && custom->src[0] == t &&
                strcmp(host.op_name(custom->op), "CUSTOM") == 0,
            "CUSTOM");
    host.op_custom = custom->op;
}

// struct ggml_cgraph is private and grows now and then, so its size is measured: ggml lays the array of nodes right
// behind it.  The three fields that the plugin names are watched changing.
void check_graph(Host & host, abi::context * ctx) {
    abi::cgraph * graph = host.new_graph_custom(ctx, 8, false);
    abi::tensor ** nodes = host.graph_nodes(graph);
    require(graph->size == 8 && graph->n_nodes == 0 && graph->nodes == nodes, "fields of ggml_cgraph");
    const auto bytes = reinterpret_cast<char *>(nodes) - reinterpret_cast<char *>(graph);
    require(bytes >= static_cast<ptrdiff_t>(sizeof(abi::cgraph)) && bytes <= 512 && bytes % sizeof(void *) == 0,
            "size of ggml_cgraph");
    host.graph_bytes = static_cast<size_t>(bytes);
    abi::tensor * t = host.new_tensor_4d(ctx, abi::kTypeF32, 1, 1, 1, 1);
    for (int i = 1; i <= 2; i++) {
        host.graph_add_node(graph, t);
        require(graph->n_nodes == i && host.graph_n_nodes(graph) == i && nodes[i - 1] == t, "nodes of ggml_cgraph");
    }
}

void check_device(const Host & host) {
    const abi::device_i & device = host.cpu->iface;
    require(device.init_backend && device.supports_op && device.get_name &&
                device.get_name(host.cpu) == host.dev_name(host.cpu) && strcmp(device.get_name(host.cpu), "CPU") == 0,
            "struct ggml_backend_device_i");
    const Library cpu = Library::of(reinterpret_cast<const void *>(device.get_name));
    if (!cpu.contains(reinterpret_cast<const void *>(device.init_backend)) ||
        !cpu.contains(reinterpret_cast<const void *>(device.supports_op))) {
        throw Refusal("something else has hooked ggml's CPU device");
    }
    abi::backend * backend = host.dev_init(host.cpu, nullptr);
    require(backend, "ggml_backend_dev_init");
    // The device pointer behind the table proves the number of its entries; their owners, that they are in use.
    const abi::backend_i & iface = backend->iface;
    const bool ok = backend->device == host.cpu && iface.get_name && strcmp(iface.get_name(backend), "CPU") == 0 &&
                    iface.free && iface.graph_compute && iface.graph_plan_create && iface.graph_plan_free &&
                    iface.graph_plan_compute && cpu.contains(reinterpret_cast<const void *>(iface.graph_compute)) &&
                    cpu.contains(reinterpret_cast<const void *>(iface.free));
    host.backend_free(backend);
    require(ok, "struct ggml_backend");
}

} // namespace

OpClass Host::classify(int32_t op) const {
    static std::atomic<OpClass> known[512];
    if (op < 0 || op >= 512) {
        return OpClass::Other;
    }
    OpClass result = known[op].load(std::memory_order_relaxed);
    if (result != OpClass::Unknown) {
        return result;
    }
    static constexpr struct {
        const char * name;
        OpClass op_class;
    } kNames[] = {
        {"MUL_MAT", OpClass::MulMat}, {"MUL_MAT_ID", OpClass::MulMatId}, {"GET_ROWS", OpClass::GetRows},
        {"NONE", OpClass::View},      {"RESHAPE", OpClass::View},        {"VIEW", OpClass::View},
        {"PERMUTE", OpClass::View},   {"TRANSPOSE", OpClass::View},      {"CPY", OpClass::Copy},
    };
    const char * name = op_name(op);
    result = strstr(name, "CUSTOM") ? OpClass::ForeignCustom : OpClass::Other;
    for (const auto & row : kNames) {
        if (strcmp(name, row.name) == 0) {
            result = row.op_class;
        }
    }
    known[op].store(result, std::memory_order_relaxed);
    return result;
}

void find_host(const void * caller, Host & host) {
    resolve(caller, host);
    check_type_tables(host);
    ContextGuard guard{host, host.init({256 * 1024, nullptr, true})};
    require(guard.ctx, "ggml_init");
    check_tensor(host, guard.ctx);
    check_graph(host, guard.ctx);
    check_device(host);
}

const void * global_registry() {
    return dlsym(RTLD_DEFAULT, "ggml_backend_load");
}

} // namespace ccq
