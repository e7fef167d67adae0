#include "elf.h"

#include <dlfcn.h>
#include <link.h>
#include <utility>
#include <vector>

namespace ccq {

namespace {

struct Object {
    size_t load_address = 0;
    std::string path;
    bool program = false;
};

bool holds(const dl_phdr_info & info, const void * address) {
    const auto at = reinterpret_cast<ElfW(Addr)>(address);
    for (int i = 0; i < info.dlpi_phnum; i++) {
        const auto & segment = info.dlpi_phdr[i];
        const ElfW(Addr) begin = info.dlpi_addr + segment.p_vaddr;
        if (segment.p_type == PT_LOAD && at >= begin && at < begin + segment.p_memsz) {
            return true;
        }
    }
    return false;
}

// All mapped objects, or only the one that holds `address`.  dlopen must not be called from inside dl_iterate_phdr,
// which holds the loader's lock, so the objects are listed first.
std::vector<Object> list_objects(const void * address) {
    struct State {
        const void * address;
        bool first;
        std::vector<Object> found;
    } state{address, true, {}};
    dl_iterate_phdr(
        [](dl_phdr_info * info, size_t, void * user) -> int {
            auto & s = *static_cast<State *>(user);
            const bool program = std::exchange(s.first, false); // the program is always the first
            if (s.address == nullptr || holds(*info, s.address)) {
                s.found.push_back({info->dlpi_addr, info->dlpi_name ? info->dlpi_name : "", program});
            }
            return 0;
        },
        &state);
    return std::move(state.found);
}

} // namespace

Library::Library(Library && other) noexcept {
    *this = std::move(other);
}

Library & Library::operator=(Library && other) noexcept {
    std::swap(handle_, other.handle_);
    std::swap(load_address_, other.load_address_);
    std::swap(path_, other.path_);
    std::swap(program_, other.program_);
    return *this;
}

Library::~Library() {
    if (handle_) {
        dlclose(handle_);
    }
}

void Library::open() {
    handle_ = dlopen(program_ ? nullptr : path_.c_str(), RTLD_NOW | RTLD_NOLOAD);
    link_map * map = nullptr;
    if (handle_ && (dlinfo(handle_, RTLD_DI_LINKMAP, &map) != 0 || !map || map->l_addr != load_address_)) {
        dlclose(handle_); // the name leads to another copy
        handle_ = nullptr;
    }
}

Library Library::of(const void * address) {
    Library library;
    if (!address) {
        return library;
    }
    for (const Object & object : list_objects(address)) {
        library.load_address_ = object.load_address;
        library.path_ = object.path;
        library.program_ = object.program;
        library.open();
        break;
    }
    return library;
}

void * Library::symbol(const char * name) const {
    return handle_ ? dlsym(handle_, name) : nullptr;
}

bool Library::contains(const void * address) const {
    for (const Object & object : list_objects(address)) {
        return object.load_address == load_address_ && object.path == path_;
    }
    return false;
}

void for_each_library(const std::function<void(const Library &)> & visit) {
    for (const Object & object : list_objects(nullptr)) {
        Library library;
        library.load_address_ = object.load_address;
        library.path_ = object.path;
        library.program_ = object.program;
        library.open();
        if (library) {
            visit(library);
        }
    }
}

std::string base_name(const std::string & path) {
    return path.substr(path.rfind('/') + 1);
}

} // namespace ccq
