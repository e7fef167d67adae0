#include "patch.h"

#include "host.h"

#include <cinttypes>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <sys/mman.h>
#include <unistd.h>

namespace ccq {

namespace {

// Protection of the mapping at `address`, as the kernel lists it; -1 if it lists none.
int protection_of(uintptr_t address) {
    FILE * maps = fopen("/proc/self/maps", "re");
    if (!maps) {
        return -1;
    }
    int protection = -1;
    char line[4352]; // the longest path and the columns before it
    while (protection < 0 && fgets(line, sizeof line, maps)) {
        uintptr_t begin = 0, end = 0;
        char flags[5] = "";
        if (sscanf(line, "%" SCNxPTR "-%" SCNxPTR " %4s", &begin, &end, flags) == 3 && begin <= address &&
            address < end) {
            protection = (flags[0] == 'r' ? PROT_READ : 0) | (flags[1] == 'w' ? PROT_WRITE : 0) |
                         (flags[2] == 'x' ? PROT_EXEC : 0);
        }
    }
    fclose(maps);
    return protection;
}

// Copies one page's share, with the page writable for that long.  A table may straddle mappings of different
// protection, so pages are taken one by one.
bool copy_in_page(unsigned char * target, const unsigned char * bytes, size_t size, uintptr_t page_size) {
    auto * page = reinterpret_cast<void *>(reinterpret_cast<uintptr_t>(target) & ~(page_size - 1));
    const int protection = protection_of(reinterpret_cast<uintptr_t>(target));
    if (protection < 0) {
        return false;
    }
    const bool writable = (protection & PROT_WRITE) != 0;
    if (!writable && mprotect(page, page_size, protection | PROT_WRITE) != 0) {
        return false;
    }
    memcpy(target, bytes, size);
    if (!writable) {
        mprotect(page, page_size, protection); // should it fail, the page stays writable: no harm to what is there
    }
    return true;
}

bool copy(unsigned char * target, const unsigned char * bytes, size_t size) {
    const auto page_size = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    while (size > 0) {
        const uintptr_t room = page_size - (reinterpret_cast<uintptr_t>(target) & (page_size - 1));
        const size_t part = size < room ? size : room;
        if (!copy_in_page(target, bytes, part, page_size)) {
            return false;
        }
        target += part;
        bytes += part;
        size -= part;
    }
    return true;
}

} // namespace

void Patches::write(void * target, const void * bytes, size_t size) {
    auto * at = static_cast<unsigned char *>(target);
    saved_.push_back({at, std::vector<unsigned char>(at, at + size)});
    if (!copy(at, static_cast<const unsigned char *>(bytes), size)) {
        throw Refusal("ggml's tables cannot be made writable (mprotect)");
    }
}

void Patches::undo() noexcept {
    for (; !saved_.empty(); saved_.pop_back()) {
        copy(saved_.back().target, saved_.back().bytes.data(), saved_.back().bytes.size());
    }
}

} // namespace ccq
