// Reads the kernels in a file of PTX, as nvcc writes it: one statement, label or directive a line, or several lines for
// what ends with a semicolon.
#pragma once

#include <cxxabi.h>

#include "decode.h"

namespace ptx {

class Parser {
public:
    static std::vector<Program> programs(const std::string& text) {
        Parser parser;
        std::istringstream lines(text);
        for (std::string line; std::getline(lines, line);) parser.read(line.substr(0, line.find("//")));
        for (Program& program : parser.programs_)
            for (Instruction& i : program.code) parser.name_file(i.source);  // files are named at the end
        return std::move(parser.programs_);
    }

private:
    std::vector<Program> programs_;
    std::map<std::string, std::string> files_;  // by number
    // Of the kernel that is being read:
    enum { outside, in_head, in_body } place_ = outside;
    std::string head_, statement_, source_;
    int depth_ = 0;  // of braces
    std::unique_ptr<Names> names_;
    std::map<std::string, int> labels_;
    std::vector<std::pair<std::size_t, std::string>> branches_;

    void read(std::string line) {
        const auto first = line.find_first_not_of(" \t\r");
        if (first == line.npos) return;
        line = line.substr(first, line.find_last_not_of(" \t\r") - first + 1);
        if (place_ == in_body) {
            read_body(line);
        } else if (line == "{" && place_ == in_head) {
            begin();
        } else if (place_ == in_head || line.find(".entry ") != line.npos) {
            place_ = in_head;
            head_ += line + " ";
        } else if (line.rfind(".file", 0) == 0) {
            std::istringstream words(line);
            std::string word, number, path;
            words >> word >> number >> path;
            files_[number] = path.substr(path.rfind('/') + 1, path.rfind('"') - path.rfind('/') - 1);
        }
    }

    void read_body(const std::string& line) {
        if (line == "{") {
            ++depth_;
        } else if (line == "}" && depth_ > 0) {
            --depth_;
        } else if (line == "}") {
            finish();
        } else if (line.rfind(".loc", 0) == 0) {
            std::istringstream words(line);
            std::string word, file, row;
            words >> word >> file >> row;
            source_ = file + ":" + row;
        } else if (line.back() == ':') {
            labels_[line.substr(0, line.size() - 1)] = int(programs_.back().code.size());
        } else {
            statement_ += line + " ";
            for (std::size_t end; (end = statement_.find(';')) != statement_.npos; statement_.erase(0, end + 1)) {
                const auto first = statement_.find_first_not_of(" \t{}");
                if (first < end) read_statement(statement_.substr(first, end - first));
            }
            if (statement_.find_first_not_of(" \t{}") == statement_.npos) statement_.clear();
        }
    }

    void begin() {
        auto word_after = [&](const std::string& directive) {
            const auto at = head_.find(directive);
            if (at == head_.npos) fail("no " + directive + " in " + head_);
            const auto from = head_.find_first_not_of(' ', at + directive.size());
            return head_.substr(from, head_.find_first_of(" (,[", from) - from);
        };
        place_ = in_body;
        programs_.emplace_back();
        names_ = std::make_unique<Names>(programs_.back());
        Program& program = programs_.back();
        program.name = demangled(word_after(".entry"));
        program.threads = std::stoi(word_after(".maxntid"));
        const auto open = head_.find('['), name = head_.rfind(' ', open) + 1;
        if (open == head_.npos || head_.find(".param") != head_.rfind(".param")) fail("not one parameter: " + head_);
        program.parameter_bytes = std::stoi(head_.substr(open + 1));
        names_->add_variable(head_.substr(name, open - name), 0);
        head_.clear();
    }

    void finish() {
        Program& program = programs_.back();
        for (auto& [at, label] : branches_) {
            if (labels_.count(label) == 0) fail("no label " + label);
            program.code[at].target = labels_[label];
        }
        for (auto& [label, at] : labels_)
            if (at < int(program.code.size())) program.code[std::size_t(at)].has_label = true;
        labels_.clear();
        branches_.clear();
        place_ = outside;
    }

    void read_statement(std::string text) {
        if (text.rfind(".pragma", 0) == 0) return;
        if (text[0] == '.') return declare(text);
        std::vector<Instruction>& code = programs_.back().code;
        Instruction i;
        i.text = text;
        i.source = source_;
        if (text[0] == '@') {
            const auto end = text.find_first_of(" \t");
            i.guard_inverted = text[1] == '!';
            const std::size_t from = i.guard_inverted ? 2 : 1;
            i.guard = names_->reg(text.substr(from, end - from), 1);
            text = text.substr(text.find_first_not_of(" \t", end));
        }
        const auto space = text.find_first_of(" \t");
        const auto name = text.substr(0, space);
        const auto operands = space == text.npos ? std::vector<std::string>() : split(text.substr(space), ',');
        Decoder(i, name, operands, *names_);
        if (i.operation == Operation::branch) branches_.push_back({code.size(), operands.at(0)});
        code.push_back(i);
    }

    // .reg .b32 %r<12>    .reg .b32 name    .shared .align 16 .b8 name[12]
    void declare(const std::string& text) {
        std::istringstream words(text);
        std::string space, kind, name;
        words >> space >> kind;
        if (space == ".shared" && kind == ".align") {
            int alignment = 0;
            words >> alignment >> kind >> name;
            if (kind != ".b8") fail("unknown declaration " + text);
            int& bytes = programs_.back().shared_bytes;
            bytes = (bytes + alignment - 1) / alignment * alignment;
            names_->add_variable(name.substr(0, name.find('[')), u64(bytes));
            bytes += std::stoi(name.substr(name.find('[') + 1));
            return;
        }
        words >> name;
        const Type type = type_of(kind.substr(1));
        if (space != ".reg" || type.bits == 0) fail("unknown declaration " + text);
        const auto open = name.find('<');
        if (open == name.npos) return names_->add_register(name, type.bits);
        for (int k = 0; k < std::stoi(name.substr(open + 1)); ++k)
            names_->add_register(name.substr(0, open) + std::to_string(k), type.bits);
    }

    void name_file(std::string& source) const {
        const auto colon = source.find(':');
        const auto file = files_.find(source.substr(0, colon));
        if (file != files_.end()) source = file->second + source.substr(colon);
    }

    static std::string demangled(const std::string& name) {
        int status = 0;
        const std::unique_ptr<char, void (*)(void*)> text(abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status),
                                                          std::free);
        return status == 0 ? text.get() : name;
    }
};

}  // namespace ptx
