#include "png_files.hpp"

#include <png.h>

#include <algorithm>
#include <csetjmp>
#include <cstdio>
#include <cstring>
#include <stdexcept>

#include "errors.hpp"
#include "facts.hpp"

namespace {

constexpr std::size_t SIGNATURE = 8, CHANNELS = 4;

// What libpng reads, and why it stopped.
struct Source {
    const unsigned char *at, *end;
    char reason[160];
};

void read_some(png_structp png, png_bytep to, std::size_t size) {
    auto& source = *static_cast<Source*>(png_get_io_ptr(png));
    if (static_cast<std::size_t>(source.end - source.at) < size) png_error(png, "it ends too early");
    std::memcpy(to, source.at, size);
    source.at += size;
}

void stop(png_structp png, png_const_charp reason) {
    auto& source = *static_cast<Source*>(png_get_error_ptr(png));
    std::snprintf(source.reason, sizeof source.reason, "%s", reason);
    png_longjmp(png, 1);
}

void pass_over(png_structp, png_const_charp) {}

class Reader {
  public:
    explicit Reader(Source& source)
        : png_(png_create_read_struct(PNG_LIBPNG_VER_STRING, &source, stop, pass_over)),
          info_(png_ ? png_create_info_struct(png_) : nullptr) {
        if (info_) png_set_read_fn(png_, &source, read_some);
    }
    ~Reader() { png_destroy_read_struct(&png_, &info_, nullptr); }
    Reader(const Reader&) = delete;
    Reader& operator=(const Reader&) = delete;

    // Both return false where libpng stops; they hold nothing that its jump would leave behind.
    bool header() {
        if (!info_ || setjmp(png_jmpbuf(png_))) return false;
        png_read_info(png_, info_);
        return true;
    }
    bool pixels(png_bytepp rows) {
        if (setjmp(png_jmpbuf(png_))) return false;
        png_set_expand(png_);
        png_set_gray_to_rgb(png_);
        png_set_add_alpha(png_, 0xFF, PNG_FILLER_AFTER);
        png_set_interlace_handling(png_);
        png_read_update_info(png_, info_);
        if (png_get_rowbytes(png_, info_) != CHANNELS * width()) return false;
        png_read_image(png_, rows);
        png_read_end(png_, nullptr);
        return true;
    }
    std::size_t width() const { return png_get_image_width(png_, info_); }
    std::size_t height() const { return png_get_image_height(png_, info_); }
    int bits() const { return png_get_bit_depth(png_, info_); }

  private:
    png_structp png_;
    png_infop info_;
};

// Whether a chunk says that more frames follow the first picture.
bool is_animated(const unsigned char* bytes, std::size_t size) {
    for (std::size_t at = SIGNATURE; at + 8 <= size;) {
        if (!std::memcmp(&bytes[at + 4], "acTL", 4)) return true;
        std::size_t length = 0;
        for (std::size_t index = 0; index < 4; ++index) length = length << 8 | bytes[at + index];
        at += length + 12;
    }
    return false;
}

}  // namespace

std::vector<std::uint8_t> Png::colours() const {
    std::vector<std::uint8_t> colours;
    colours.reserve(pixels.size() / CHANNELS * (CHANNELS - 1));
    for (std::size_t at = 0; at < pixels.size(); ++at)
        if (at % CHANNELS != CHANNELS - 1) colours.push_back(pixels[at]);
    return colours;
}

std::vector<std::uint8_t> Png::mask() const {
    bool opaque = true;
    for (std::size_t at = CHANNELS - 1; at < pixels.size(); at += CHANNELS) opaque = opaque && pixels[at] == 255;
    std::vector<std::uint8_t> mask;
    for (std::size_t at = 0; at < pixels.size(); at += CHANNELS) {
        const std::uint8_t* const pixel = &pixels[at];
        const int bright = (pixel[0] * 19595 + pixel[1] * 38470 + pixel[2] * 7471 + 0x8000) >> 16;  // as Pillow
        mask.push_back(static_cast<std::uint8_t>(opaque ? bright : 255 - pixel[3]));
    }
    return mask;
}

Png read_png(const unsigned char* bytes, std::size_t size, const std::string& name, std::size_t height,
             std::size_t width, const char* reason) {
    const auto refuse = [&](const std::string& what) { throw std::invalid_argument(name + ": " + what); };
    if (size < SIGNATURE || png_sig_cmp(bytes, 0, SIGNATURE)) refuse("not a picture in PNG");
    Source source = {bytes, bytes + size, "no memory"};
    Reader reader(source);
    if (!reader.header()) refuse(std::string("cannot be read as a picture: ") + source.reason);
    Png png = {reader.height(), reader.width()};
    const auto most = static_cast<std::size_t>(dit_runtime::limit("pixels"));
    if (png.width * png.height > most)
        refuse(dit_runtime::text(png.width, " x ", png.height, " pixels; expected at most ", most, " in all"));
    if (reader.bits() != 8) refuse(dit_runtime::text(reader.bits(), " bits a channel; expected 8"));
    if (is_animated(bytes, size)) refuse("an animation; expected one picture");
    if (height && (png.height != height || png.width != width))
        refuse(
            dit_runtime::text(png.width, " x ", png.height, " pixels; expected ", width, " x ", height, ", ", reason));
    png.pixels.resize(CHANNELS * png.width * png.height);
    std::vector<png_bytep> rows;
    for (std::size_t row = 0; row < png.height; ++row) rows.push_back(&png.pixels[row * png.width * CHANNELS]);
    if (!reader.pixels(rows.data())) refuse(std::string("cannot be read as a picture: ") + source.reason);
    return png;
}
