#include <dit/dit.hpp>
#include <iostream>

int main(int, char** words) {
    dit::Pipeline pipe(words[1]);
    dit::Request request;
    request.labels = {pipe.find_label("honey bee"), 4};
    request.steps = 2;
    std::cout << (pipe.generate(request).pixels.size() == 2 * 32 * 32 * 3 ? "drawn\n" : "not drawn\n");
}
