// Writes into the host's memory that can be taken back.
#pragma once

#include <cstddef>
#include <vector>

namespace ccq {

// Overwrites bytes of the host, through read-only (RELRO) pages where needed, and remembers what was there.
class Patches {
  public:
    // Throws Refusal if the pages cannot be made writable; earlier writes stay until undo().
    void write(void * target, const void * bytes, size_t size);

    template <typename T> void write(const T & target, const T & value) {
        write(const_cast<T *>(&target), &value, sizeof value);
    }

    // Restores everything, last write first.
    void undo() noexcept;

  private:
    struct Saved {
        unsigned char * target;
        std::vector<unsigned char> bytes;
    };
    std::vector<Saved> saved_;
};

} // namespace ccq
