// Which shared object an address lies in, and the symbols that object sees.
#pragma once

#include <functional>
#include <string>

namespace ccq {

// A mapped object (a shared library or the program itself).  Holds a dlopen handle, never the file again: opening a
// library under another of its names would map a second copy.
class Library {
  public:
    Library() = default;
    Library(Library && other) noexcept;
    Library & operator=(Library && other) noexcept;
    ~Library();

    // The object whose segments hold `address`; false from operator bool if there is none.
    static Library of(const void * address);

    explicit operator bool() const { return handle_ != nullptr; }

    // As the object itself would resolve `name` among its own symbols and its dependencies; nullptr if nowhere.
    void * symbol(const char * name) const;

    bool contains(const void * address) const;
    const std::string & path() const { return path_; }
    bool is_program() const { return program_; }

  private:
    friend void for_each_library(const std::function<void(const Library &)> & visit);
    Library(size_t load_address, const char * path); // as the loader has them: the program has no path
    void open();

    void * handle_ = nullptr;
    size_t load_address_ = 0;
    std::string path_;
    bool program_ = false;
};

// Visits every mapped object that can be opened.
void for_each_library(const std::function<void(const Library &)> & visit);

// The last component of a path.
std::string base_name(const std::string & path);

} // namespace ccq
