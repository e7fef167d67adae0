#include "hooks.h"

#include "graph.h"

#include <cstdio>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <shared_mutex>
#include <unordered_map>

namespace ccq {

namespace {

// A CPU backend that was created through the hooked device.
struct HookedBackend {
    abi::backend_i stock;
    GraphCopy graph;
    // Graph plans outlive the call that makes them, so each keeps its own copy.
    std::unordered_map<void *, std::unique_ptr<GraphCopy>> plans;
};

// Lives for good (the library is never unloaded), as the host's threads may still compute while it exits.
struct Registry {
    const Host * host = nullptr;
    abi::device_i stock{};
    std::shared_mutex mutex;
    std::unordered_map<abi::backend *, std::unique_ptr<HookedBackend>> backends;
};

Registry & registry() {
    static auto * instance = new Registry;
    return *instance;
}

HookedBackend & hooked(abi::backend * backend) {
    const std::shared_lock lock(registry().mutex);
    return *registry().backends.at(backend);
}

int finish(const GraphCopy & graph, int status) {
    const char * reason = graph.failure();
    if (status != abi::kStatusSuccess || !reason) {
        return status;
    }
    fprintf(stderr, "ccq: a graph failed: %s\n", reason);
    return abi::kStatusFailed;
}

int graph_compute(abi::backend * backend, abi::cgraph * graph) {
    HookedBackend & ours = hooked(backend);
    abi::cgraph * copy = nullptr;
    try {
        copy = ours.graph.rewrite(graph);
    } catch (const std::bad_alloc &) {
        return abi::kStatusAllocFailed;
    }
    return copy ? finish(ours.graph, ours.stock.graph_compute(backend, copy))
                : ours.stock.graph_compute(backend, graph);
}

void * graph_plan_create(abi::backend * backend, const abi::cgraph * graph) {
    HookedBackend & ours = hooked(backend);
    try {
        auto own = std::make_unique<GraphCopy>(*registry().host);
        const abi::cgraph * copy = own->rewrite(graph);
        void * plan = ours.stock.graph_plan_create(backend, copy ? copy : graph);
        if (plan && copy) {
            ours.plans[plan] = std::move(own);
        }
        return plan;
    } catch (const std::bad_alloc &) {
        return nullptr;
    }
}

int graph_plan_compute(abi::backend * backend, void * plan) {
    HookedBackend & ours = hooked(backend);
    const auto own = ours.plans.find(plan);
    if (own != ours.plans.end()) {
        own->second->restart();
    }
    const int status = ours.stock.graph_plan_compute(backend, plan);
    return own == ours.plans.end() ? status : finish(*own->second, status);
}

void graph_plan_free(abi::backend * backend, void * plan) {
    HookedBackend & ours = hooked(backend);
    ours.stock.graph_plan_free(backend, plan);
    ours.plans.erase(plan);
}

void backend_free(abi::backend * backend) {
    const auto stock_free = hooked(backend).stock.free;
    {
        const std::unique_lock lock(registry().mutex);
        registry().backends.erase(backend);
    }
    stock_free(backend);
}

abi::backend * init_backend(abi::device * device, const char * params) {
    Registry & reg = registry();
    abi::backend * backend = reg.stock.init_backend(device, params);
    if (!backend) {
        return nullptr;
    }
    try {
        auto ours = std::unique_ptr<HookedBackend>(new HookedBackend{backend->iface, GraphCopy(*reg.host), {}});
        const std::unique_lock lock(reg.mutex);
        reg.backends[backend] = std::move(ours);
    } catch (const std::bad_alloc &) {
        backend->iface.free(backend);
        return nullptr;
    }
    // The backend is the host's heap object; threads, threadpool and abort callback stay its own affair.
    backend->iface.free = backend_free;
    backend->iface.graph_compute = graph_compute;
    backend->iface.graph_plan_create = graph_plan_create;
    backend->iface.graph_plan_compute = graph_plan_compute;
    backend->iface.graph_plan_free = graph_plan_free;
    return backend;
}

// The stock code says yes to almost everything and aborts later when it meets a type that its switch does not list.
bool supports_op(abi::device * device, const abi::tensor * op) {
    return (!involves_ccq(*op) || can_run(registry().host->classify(op->op), *op)) &&
           registry().stock.supports_op(device, op);
}

} // namespace

void install_hooks(const Host & host, Patches & patches) {
    Registry & reg = registry();
    reg.host = &host;
    reg.stock = host.cpu->iface;
    patches.write(host.cpu->iface.supports_op, &supports_op);
    patches.write(host.cpu->iface.init_backend, &init_backend);
}

size_t own_nodes_of(abi::backend * backend) {
    const std::shared_lock lock(registry().mutex);
    const auto found = registry().backends.find(backend);
    return found == registry().backends.end() ? 0 : found->second->graph.own_nodes();
}

} // namespace ccq
