// The CPU device's hooks: which ops it takes, and what its backends run.
#pragma once

#include "host.h"
#include "patch.h"

namespace ccq {

// From here on, backends of the host's CPU device run our nodes.  `host` must stay where it is for good.
void install_hooks(const Host & host, Patches & patches);

// Nodes that the last graph of this backend had replaced; 0 for a backend that is not hooked.
size_t own_nodes_of(abi::backend * backend);

} // namespace ccq
