#include "elf.h"

#include <dlfcn.h>
#include <link.h>
#include <utility>
#include <vector>

namespace ccq {

namespace {

// What the loader knows of the object that holds `address`; nullptr if none does.
const link_map * map_of(const void * address) {
    Dl_info info;
    void * map = nullptr;
    return address && dladdr1(address, &info, &map, RTLD_DL_LINKMAP) ? static_cast<link_map *>(map) : nullptr;
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

Library::Library(size_t load_address, const char * path)
    : load_address_(load_address), path_(path ? path : ""), program_(path_.empty()) {
    open();
}

Library Library::of(const void * address) {
    const link_map * map = map_of(address);
    return map ? Library(map->l_addr, map->l_name) : Library();
}

void * Library::symbol(const char * name) const {
    return handle_ ? dlsym(handle_, name) : nullptr;
}

bool Library::contains(const void * address) const {
    const link_map * map = map_of(address);
    return map && map->l_addr == load_address_ && map->l_name == path_;
}

void for_each_library(const std::function<void(const Library &)> & visit) {
    // dlopen must not be called from inside dl_iterate_phdr, which holds the loader's lock.
    std::vector<std::pair<size_t, std::string>> objects;
    dl_iterate_phdr(
        [](dl_phdr_info * info, size_t, void * user) -> int {
            auto & found = *static_cast<decltype(objects) *>(user);
            found.emplace_back(info->dlpi_addr, info->dlpi_name ? info->dlpi_name : "");
            return 0;
        },
        &objects);
    for (const auto & [load_address, path] : objects) {
        if (const Library library(load_address, path.c_str()); library) {
            visit(library);
        }
    }
}

std::string base_name(const std::string & path) {
    return path.substr(path.rfind('/') + 1);
}

} // namespace ccq
