// Draws one picture of each class that is named into PPM files: example-cpp BUNDLE LABEL …
#include <dit/dit.hpp>
#include <fstream>
#include <iostream>

int main(int count, char** words) try {
    if (count < 3) return std::cerr << "usage: " << words[0] << " BUNDLE LABEL …\n", 2;
    dit::Pipeline pipe(words[1]);
    dit::Request request;
    for (int index = 2; index < count; ++index) request.labels.push_back(pipe.find_label(words[index]));
    request.on_step = [](int step, int steps, const double*, std::size_t) {
        std::cerr << "\rstep " << step << " of " << steps;
        return false;  // true stops the run
    };
    const dit::Images images = pipe.generate(request);
    const std::size_t size = images.height * images.width * 3;
    for (std::size_t index = 0; index < images.count; ++index) {
        const std::string name = std::to_string(index) + ".ppm";
        std::ofstream file(name, std::ios::binary);
        file << "P6 " << images.width << ' ' << images.height << " 255\n";
        file.write(reinterpret_cast<const char*>(&images.pixels[index * size]), static_cast<std::streamsize>(size));
        std::cerr << '\n' << name;
    }
    std::cerr << '\n';
    return 0;
} catch (const dit::Error& error) {
    std::cerr << error.what() << '\n';
    return 1;
}
